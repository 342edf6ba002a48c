"""safetensors files: read without the package, written as it reads them."""

from surgery.files.safetensors.reading import open_file
from surgery.files.safetensors.writing import write_file

__all__ = ['open_file', 'write_file']
