"""The running controller: its loop, what it remembers, what it publishes, and the services that it offers."""
