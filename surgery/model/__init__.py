"""A saved model as data: tensors, manifest, records of adapters."""
