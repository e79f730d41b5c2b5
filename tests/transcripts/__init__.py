"""Commands in, every action and state out, as text that a person can read and review (after etcd's raft)."""
