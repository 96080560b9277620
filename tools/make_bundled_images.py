"""Make data/bundled_photos: 32x32 colour patches of photographs in the scikit-image and scikit-learn wheels.

    python tools/make_bundled_images.py [FOLDER]

Nothing is downloaded. The split is by picture. The same wheels give the same files, byte for byte."""
import hashlib
import io
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# split, picture, package, file in the package
PICTURES = [
    ('train', 'astronaut', 'skimage.data', 'astronaut.png'),
    ('train', 'coffee', 'skimage.data', 'coffee.png'),
    ('train', 'rocket', 'skimage.data', 'rocket.jpg'),
    ('train', 'tissue', 'skimage.data', 'ihc.png'),
    ('train', 'china', 'sklearn.datasets.images', 'china.jpg'),
    ('test', 'chelsea', 'skimage.data', 'chelsea.png'),
    ('test', 'flower', 'sklearn.datasets.images', 'flower.jpg'),
]
SHA256 = {
    'astronaut.png': '88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5',
    'coffee.png': 'cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7',
    'rocket.jpg': 'c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c',
    'ihc.png': 'f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef',
    'china.jpg': '8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29',
    'chelsea.png': '596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb',
    'flower.jpg': 'a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638',
}
SHRINK = (2, 3, 4, 6, 8)  # the picture is averaged down by these factors before it is cut
SIZE, STEP = 32, 16       # pixels of a patch, and from one patch to the next
FLAT = 0.05               # standard deviation, in [0, 1], below which a patch is left out: blank sky flatters


def picture(package, file):
    data = (files(package)/file).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[file]:
        raise ValueError(f'{file} has sha256 {found}, expected {SHA256[file]}: install the pinned versions')
    return Image.open(io.BytesIO(data)).convert('RGB')


def patches(im, name, split):
    for k in SHRINK:
        a = np.asarray(im.reduce(k))
        for y in range(0, a.shape[0]-SIZE+1, STEP):
            for x in range(0, a.shape[1]-SIZE+1, STEP):
                p = a[y:y+SIZE, x:x+SIZE]
                if p.std((0, 1)).mean()/255 >= FLAT:
                    yield f'{split}/{name}/{k}x-{y:03d}-{x:03d}.webp', p


def webp(p):
    out = io.BytesIO()
    Image.fromarray(p).save(out, 'webp', lossless=True, quality=100, method=6)
    return out.getvalue()


def make(folder):
    names = [p[1] for p in PICTURES]
    features = {'img': {'_type': 'Image'}, 'label': {'names': names, '_type': 'ClassLabel'}}
    image = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    schema = pa.schema([('img', image), ('label', pa.int64())],
                       metadata={'huggingface': json.dumps({'info': {'features': features}})})
    for split in ('train', 'test'):
        rows = [{'img': {'bytes': webp(p), 'path': path}, 'label': names.index(name)}
                for s, name, package, file in PICTURES if s == split
                for path, p in patches(picture(package, file), name, split)]
        order = np.random.RandomState(0).permutation(len(rows))
        table = pa.Table.from_pylist([rows[i] for i in order], schema=schema)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder/f'{split}.parquet'
        pq.write_table(table, file, compression='none', use_dictionary=False, write_statistics=False)
        print(f'{split}: {len(rows)} patches, {file.stat().st_size/1e6:.2f} MB')


if __name__ == '__main__':
    default = Path(__file__).resolve().parents[1]/'data'/'bundled_photos'
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
