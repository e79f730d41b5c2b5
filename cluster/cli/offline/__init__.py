"""Commands that need no cluster: they read files, and the machines that would run one."""
