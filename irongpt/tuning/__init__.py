"""The `irongpt tune` command: launch options measured on this GPU."""
