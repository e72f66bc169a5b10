"""What the README quotes: one command a table; results/ keeps JSON with hardware, versions and command."""
