"""Workers of rival engines. They run in separate environments and import only this package."""
