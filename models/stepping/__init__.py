"""Runs that share each forward: they ask for forwards of networks, and those that fit each other are run as one."""
