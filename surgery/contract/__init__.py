"""What authors of plugins write against: adapters, sites, hooks."""
