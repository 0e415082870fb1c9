"""What each command does; `vipo.cli` gives them their names. Heavy libraries are imported inside the commands."""
