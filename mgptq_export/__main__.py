from mgptq_export.cli import main

main()
