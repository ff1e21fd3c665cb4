"""The room of preparation: files of text to a folder of token shards (shards/).

    inputs.py    globs to parts of files, parts to units of work
    reading.py   a part to documents
    filters.py   what a document must be; its digest
    units.py     a unit to tokens, sorted by digest          (in parallel)
    merge.py     a range of digests, over all units, to a shard    (in parallel)
    crew.py      tasks in parallel on this machine
    beam.py      the same tasks on any Beam runner
    run.py       all of it, again and again until it is done

Every step is a function of its inputs alone and leaves a mark with checksums, so a killed preparation goes on
where it was and ends in the same bytes.
"""
