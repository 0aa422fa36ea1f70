"""What every launch of a kernel needs."""
