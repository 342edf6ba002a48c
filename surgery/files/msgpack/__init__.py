"""flax msgpack files: read without flax, written byte for byte as flax does."""

from surgery.files.msgpack.reading import open_file
from surgery.files.msgpack.writing import write_file

__all__ = ['open_file', 'write_file']
