"""The entry point: an interrupt while the command itself is imported ends like any other."""

from mgptq_runtime.signals import exit_at_once, exit_on_signals

__all__ = ["main"]


def main() -> None:
    """Run the command ``mgptq-export``."""
    exit_on_signals()
    with exit_at_once():
        from mgptq_export.cli import main as run
    run()


if __name__ == "__main__":
    main()
