"""One row of numbers as a zarr3 array, through TensorStore: large files, of which a small range is read at a time.

A file holds many pieces, each with its CRC-32C, and where they are: zarr's sharding. What is missing is an error here,
and not zeros, as zarr has it.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from latent_loop.storage import Path, is_local, objects

_CACHE_BYTES = 2**24  # of all open arrays: where the pieces of their files are


def encoded(
  chunks: Iterable[bytes], dtype: np.dtype, length: int, sizes: tuple[int, int]
) -> Iterator[tuple[str, bytes]]:
  """(name, content) of every file of an array; the same numbers, the same bytes.

  chunks: its numbers, one file after the other. sizes: of a file and of a piece, in numbers.
  """
  spec = {**_SPEC, 'kvstore': {'driver': 'memory'}, 'metadata': _metadata(dtype, length, *sizes)}
  array = ts.open(spec, create=True, context=ts.Context()).result()
  for number, raw in enumerate(chunks):
    start, values = number * sizes[0], np.frombuffer(raw, dtype)
    array[start : start + len(values)].write(values).result()
    name = f'c/{number}'
    yield name, array.kvstore[name]
    del array.kvstore[name]  # one file at a time is held in memory
  yield 'zarr.json', array.kvstore['zarr.json']


class Array:
  """Numbers of an array at random. Raises ValueError for what is missing or damaged."""

  def __init__(self, folder: Path, dtype: np.dtype, length: int):
    if is_local(folder):
      store = {'driver': 'file', 'path': f'{folder}/'}
    else:
      bucket, _, key = str(folder).removeprefix('gs://').partition('/')
      store = {'driver': 'gcs', 'bucket': bucket, 'path': f'{key}/'}
    self._array = ts.open({**_SPEC, 'kvstore': store}, context=_context(), read=True).result()
    found = self._array.shape, self._array.dtype.numpy_dtype
    if found != ((length,), dtype):
      raise ValueError(f'it is an array of {found[0]} {found[1]}, where the manifest wants {(length,)} {dtype}')

  def read(self, start: int, stop: int) -> np.ndarray:
    return self._array[start:stop].read().result()


# What is not there is no zero; so zeros are written too. Nobody changes a file while it is read.
_SPEC = {
  'driver': 'zarr3', 'fill_missing_data_reads': False, 'store_data_equal_to_fill_value': True,
  'recheck_cached_data': False, 'recheck_cached_metadata': False,
}  # fmt: skip


@functools.cache
def _context() -> ts.Context:
  return ts.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}, 'gcs_request_retries': objects.RETRIES})


def _metadata(dtype: np.dtype, length: int, file_size: int, piece_size: int) -> dict:
  codecs = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
  pieces = {'chunk_shape': [piece_size], 'codecs': codecs, 'index_codecs': codecs, 'index_location': 'end'}
  return {
    'shape': [length],
    'data_type': dtype.name,
    'fill_value': 0,
    'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [file_size]}},
    'chunk_key_encoding': {'name': 'default'},
    'codecs': [{'name': 'sharding_indexed', 'configuration': pieces}],
  }
