"""Who may do what: identities and the table (table), what a process shows and accepts (credentials), the interceptor
that enforces it (gate), channels that show a credential (channel), and leases for direct traffic (lease)."""
