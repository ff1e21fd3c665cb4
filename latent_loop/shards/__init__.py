"""The room of prepared data: a folder of token shards with an index and a manifest.

A split (train, validation) is one long stream of tokens, cut into shards. Shard k of a split is two files:
train-0000k.arrayrecord, whose record i holds tokens [i * RECORD_TOKENS, (i + 1) * RECORD_TOKENS) of the shard, little
endian; and train-0000k.index.npy, which says where its documents end and where each came from. Instead of the first
there may be a folder, train-0000k.zarr: the same tokens as a zarr3 array, whose pieces are those records. The documents
of a folder are in the order of their digests, which is a shuffle that does not depend on who prepared them.
"""
