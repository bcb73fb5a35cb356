"""What each endpoint does: one module per resource, one function per operation."""
