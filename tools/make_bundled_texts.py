"""Make data/bundled_texts: code and scripts other than Latin, a whole text in each row.

    python tools/make_bundled_texts.py [FOLDER]

Nothing is downloaded. The code, and what is in Chinese, Japanese and Korean, come inside Python 3.11.7
(`random.py` and `test/cjkencodings`); the rest is written here."""
import hashlib
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# of all that comes from Python
SHA256 = 'fecd657d42160772ff6b37a2c60a06116636971b4b34d0aa1bf70179fed3e045'
OF_PYTHON = {'Python': 'random.py', 'Chinese': 'test/cjkencodings/gb18030-utf8.txt',
             'Japanese': 'test/cjkencodings/euc_jp-utf8.txt', 'Korean': 'test/cjkencodings/euc_kr-utf8.txt'}
OUR_OWN = {
    'Russian': """Головоломка — это квадрат из тридцати строк по тридцать клеток, и в клетке стоит цифра.
В такой квадрат можно записать картинку, секунду звука или страницу текста, а потом прочесть их обратно.
Буквы кириллицы занимают в памяти по два байта, но первый из них почти всегда один и тот же, и угадать его
нетрудно. Чем длиннее текст, тем лучше угадывается следующая буква: слова повторяются, и их окончания.
""",
    'Greek': """Το παζλ είναι ένα τετράγωνο με τριάντα γραμμές και στήλες, και κάθε κελί έχει ένα ψηφίο.
Σε ένα τέτοιο τετράγωνο χωράει μια εικόνα, ένα δευτερόλεπτο ήχου ή μια σελίδα κειμένου.
Όσο πιο μεγάλο είναι το κείμενο, τόσο πιο εύκολα μαντεύει κανείς το επόμενο γράμμα.
""",
    'Arabic': """اللغز مربع من ثلاثين سطرا وثلاثين عمودا، وفي كل خانة رقم واحد.
يمكن أن نكتب في هذا المربع صورة أو ثانية من الصوت أو صفحة من النص، ثم نقرأها مرة أخرى كما كانت.
كلما طال النص سهل علينا أن نعرف الحرف التالي.
""",
    'Hebrew': """החידה היא ריבוע של שלושים שורות ושלושים עמודות, ובכל משבצת יש ספרה אחת.
אפשר לכתוב בריבוע הזה תמונה, שנייה של צליל או עמוד של טקסט, ואחר כך לקרוא אותם בחזרה.
ככל שהטקסט ארוך יותר, קל יותר לנחש את האות הבאה.
""",
    'Hindi': """पहेली तीस पंक्तियों और तीस स्तंभों का एक वर्ग है, और हर खाने में एक अंक है।
इस वर्ग में एक चित्र, एक सेकंड की ध्वनि या एक पन्ने का पाठ लिखा जा सकता है, और फिर वापस पढ़ा जा सकता है।
पाठ जितना लंबा होता है, अगला अक्षर पहचानना उतना ही आसान होता है।
""",
    'signs': '🙂🙃 ➕ 🧩 = 🎉 · ½ × ⅔ ≈ ⅓ · ∀x ∃y: x ≤ y² · ♞♟ 🇫🇷🇯🇵 👩‍🔬 · '
             'e\u0301 ≠ é · \u200d\ufeff\u2028 · 𝒜𝔅ℂ 𓂀 𐍈\n',
}


def texts() -> dict: # name -> text
    "Raises ValueError where this Python brings other files."
    folder = Path(sysconfig.get_paths()['stdlib'])
    raw = {name: (folder/file).read_bytes() for name, file in OF_PYTHON.items()}
    found = hashlib.sha256(b''.join(raw.values())).hexdigest()
    if found != SHA256:
        raise ValueError(f'the files of this Python have sha256 {found}, expected {SHA256}: '
                         'use Python 3.11.7')
    return {name: data.decode() for name, data in raw.items()} | OUR_OWN


def make(folder):
    rows, file = texts(), folder/'test.parquet'
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({'name': list(rows), 'text': list(rows.values())})
    pq.write_table(table, file, compression='zstd', use_dictionary=False, write_statistics=False)
    print(f'{len(rows)} texts, {sum(map(len, rows.values())):,} characters, {file.stat().st_size/1e3:.0f} kB')


if __name__ == '__main__':
    default = Path(__file__).resolve().parents[1]/'data'/'bundled_texts'
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
