"""What the commands of `pumer` do; see `pumer.cli`."""
