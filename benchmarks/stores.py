"""Where should teacher outputs be kept on disk? Three stores, written batch by batch and read back in random batches of 64.

`python -m benchmarks.stores [--out benchmarks]` writes stores.md and stores.json: seconds to write all, seconds to open and check, and
milliseconds of CPU time for a batch. Each store compares what it reads with a checksum: the databases for each value, the files for
each file as it is opened. Needs lmdb and safetensors: `pip install fastkd[bench]`."""
import hashlib, json, os, random, sqlite3, tempfile, time, torch
from argparse import ArgumentParser
from fastkd.cache import Block, read_folder, write_block
from pathlib import Path

def checksum(key, value): return hashlib.blake2b(key + value, digest_size=8).digest()

def joined(values, shape): return torch.frombuffer(bytearray().join(values), dtype=torch.float32).view(-1, *shape)

class Database:
    "Values one by one"
    def __init__(self, path): self.path = path
    def close(self): "Nothing to close"
    def write(self, keys, rows, bs=64):
        values = [row.numpy().tobytes() for row in rows]
        pairs = [(key, checksum(key, value) + value) for key, value in zip(keys, values)]
        for i in range(0, len(keys), bs): self.put(pairs[i:i + bs])

    def read(self, keys, shape):
        found = self.get(keys)
        for key, value in zip(keys, found): assert checksum(key, value[8:]) == value[:8]
        return joined([value[8:] for value in found], shape)

class LMDB(Database):
    def __init__(self, path):
        super().__init__(path)
        import lmdb # of the extra `bench`, and before time is taken
        self.lmdb = lmdb

    def open(self): self.env = self.lmdb.open(str(self.path/'lmdb'), map_size=2**33)
    def close(self): self.env.close()
    def put(self, pairs):
        with self.env.begin(write=True) as transaction:
            for key, value in pairs: transaction.put(key, value)

    def get(self, keys):
        with self.env.begin() as transaction: return [transaction.get(key) for key in keys]

class SQLite(Database):
    def open(self):
        self.db = sqlite3.connect(self.path/'outputs.db')
        self.db.executescript('pragma journal_mode=wal; pragma synchronous=normal; '
            'create table if not exists outputs (key blob primary key, value blob)')

    def put(self, pairs):
        with self.db: self.db.executemany('insert or replace into outputs values (?, ?)', pairs)

    def get(self, keys):
        found = dict(self.db.execute(f"select * from outputs where key in ({','.join('?'*len(keys))})", keys))
        return [found[key] for key in keys]

class Safetensors(Database):
    "The files of fastkd's cache"
    def open(self): self.places = {key: (block, row) for block in read_folder(self.path) for row, key in enumerate(block.keys)}
    def write(self, keys, rows):
        n = max(1, 2**26//rows[0].nbytes)
        for i in range(0, len(keys), n): write_block(self.path, Block(keys[i:i + n], dict(pred=rows[i:i + n].contiguous())))

    def read(self, keys, shape): return torch.stack([block.tensors['pred'][row] for block, row in (self.places[key] for key in keys)])

def measure(cls, n, shape, n_batches=200):
    "Seconds to write `n` outputs and to open them, milliseconds to read a batch"
    rows, keys = torch.randn(n, *shape), [os.urandom(24) for _ in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        store, start = cls(Path(folder)), time.process_time()
        store.open()
        store.write(keys, rows)
        store.close()
        written, start = time.process_time() - start, time.process_time()
        store.open()
        opened, start = time.process_time() - start, time.process_time()
        for _ in range(n_batches):
            chosen = random.sample(range(n), 64)
            assert torch.equal(store.read([keys[i] for i in chosen], shape), rows[chosen])
        return written, opened, 1000*(time.process_time() - start)/n_batches

def told(found):
    "All of it as Markdown"
    lines = ['# Stores for teacher outputs', '', 'Made by `python -m benchmarks.stores`: CPU time, one thread.', '',
        '| outputs | store | writing (s) | opening (s) | a batch of 64 (ms) |', '|---|---|--:|--:|--:|']
    lines += [f'| {shape} | {name} | {write:.2f} | {opening:.2f} | {batch:.2f} |'
        for shape, stores in found.items() for name, (write, opening, batch) in stores.items()]
    return '\n'.join(lines) + '\n'

def main(out):
    torch.set_num_threads(1)
    found = {str((n, *shape)): {cls.__name__: measure(cls, n, shape) for cls in (LMDB, SQLite, Safetensors)}
        for n, shape in ((60000, (10,)), (20000, (1000,)), (3000, (512, 4, 4)), (3000, (64, 16, 16)))}
    (out/'stores.json').write_text(json.dumps(found, indent=1) + '\n')
    (out/'stores.md').write_text(told(found))
    print(told(found))

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default='benchmarks')
    main(parser.parse_args().out)
