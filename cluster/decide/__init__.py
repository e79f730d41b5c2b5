"""What the controller decides, from what it sees. Pure: nothing here waits, reads a clock or talks to anybody."""
