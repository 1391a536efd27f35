"""The control API: HTTP on a Unix socket, for the command line and for programs on this machine."""
