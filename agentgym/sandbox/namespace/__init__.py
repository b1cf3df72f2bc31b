"""The tier without a daemon: bubblewrap, with cgroups, a filter of system calls and Landlock behind it."""
