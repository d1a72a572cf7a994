from mgptq_runtime.cli import main

main()
