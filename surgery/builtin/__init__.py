"""Plugins that come with the library, declared like anybody's."""
