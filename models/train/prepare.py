"""Turn the HTML of the `rust-docs` component into text, and split it.

Reads `$(rustc --print sysroot)/share/doc/rust/html` and writes:

    OUT/corpus.jsonl            pre-training documents, one {"path", "text"} a line
    MODELS/heldout/*.txt        whole chapters that pre-training never sees
    MODELS/finetune/train.txt   the error-code index, for the LoRA demonstration
    MODELS/finetune/heldout.txt every tenth page of it, never trained on

Three steps, all deterministic (sorted paths, no clock, no random numbers):

1.  Each page becomes blocks of Markdown: headings, paragraphs, lists, tables, fenced code. Navigation is dropped.
2.  A block is written once. Two blocks are the same when they agree after digits and number types (`u8`, `f64`, ...)
    are made equal, since the standard library repeats its documentation for every number type.
3.  A block of the pre-training text is dropped when at least half of its runs of eight words also stand in the
    held-out chapters or in the fine-tuning text.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent

# All of these are MIT or Apache-2.0. The prose of the embedded book is CC-BY-SA 4.0, so it is not here.
BOOKS = (
    "book",
    "cargo",
    "clippy",
    "edition-guide",
    "nomicon",
    "reference",
    "rust-by-example",
    "rustc",
    "rustdoc",
    "style-guide",
    "unstable-book",
)
CRATES = ("std", "alloc", "core", "proc_macro", "test")
FINETUNE = "error_codes"
FINETUNE_HELDOUT_EVERY = 10

# Redirects of old editions, translations, whole books on one page, tables of contents.
SKIPPED_DIRS = {"first-edition", "second-edition", "2018-edition", "es", "ja", "ko", "zh", "arch", "core_arch"}
SKIPPED_PAGES = {"print.html", "toc.html", "all.html", "SUMMARY.html", "404.html", "test-summary.html"}

# Whole chapters, by the start of the page's path.
HELDOUT = {
    "book-ch08-collections": ("book/ch08-",),
    "book-ch09-error-handling": ("book/ch09-",),
    "book-ch16-concurrency": ("book/ch16-",),
    "nomicon-ownership": ("nomicon/subtyping", "nomicon/dropck", "nomicon/phantom-data", "nomicon/send-and-sync"),
    "reference-destructors": ("reference/destructors",),
    "reference-patterns": ("reference/patterns",),
}

SHINGLE = 8
SHORT = 40
PLAIN_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u200b": None})

HEADINGS = {f"h{level}": level for level in range(1, 7)}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
NOISE_TAGS = {"button", "nav", "rustdoc-toolbar", "script", "style", "svg", "template"}
NOISE_CLASSES = {
    "anchor",
    "boring",
    "buttons",
    "doc-anchor",
    "hideme",
    "item-info",
    "item-table",
    "rightside",
    "rule",
    "rule-link",
    "rustdoc-breadcrumbs",
    "sidebar",
    "since",
    "src",
    "stab",
    "sub-heading",
    "test-arrow",
    "test-link",
    "tooltip",
}
BLOCK_TAGS = {"p", "div", "section", "dt", "dd", "figcaption", "blockquote", "summary", "details"}
CODE_HEADER = "code-header"


class PageReader(HTMLParser):
    """Collects the blocks of one page of mdBook or rustdoc."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self._open: list[str] = []
        self._main_depth: int | None = None
        self._noise_depth: int | None = None
        self._text: list[str] = []
        self._heading = 0
        self._signature_depth: int | None = None
        self._pre_depth: int | None = None
        self._language = ""
        self._lists: list[int | None] = []
        self._list_lines: list[str] = []
        self._row: list[str] | None = None
        self._table: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the element opens: noise, a block, a list, a table, code."""
        if tag == "br" and self._reading():
            self._text.append("\n" if self._pre_depth else " ")
        if tag in VOID:
            return
        self._open.append(tag)
        depth = len(self._open)
        classes = set((dict(attrs).get("class") or "").split())
        if tag == "main":
            self._main_depth = depth
        if not self._reading():
            return
        if tag in NOISE_TAGS or classes & NOISE_CLASSES:
            self._noise_depth = depth
        elif self._pre_depth is not None:
            if tag == "code":
                named = (c.removeprefix("language-") for c in classes if c.startswith("language-"))
                self._language = next(named, self._language)
            elif tag == "div":
                self._text.append("\n")
        elif tag == "pre":
            self._flush()
            self._pre_depth = depth
            self._language = "rust" if "rust" in classes else ""
        elif CODE_HEADER in classes:
            self._flush()
            self._signature_depth = depth
        elif tag in HEADINGS:
            self._flush()
            self._heading = HEADINGS[tag]
        elif tag in ("ul", "ol"):
            self._flush()
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self._flush()
            self._list_lines.append("")
        elif tag == "table":
            self._flush()
            self._table = []
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._text = []
        elif tag in ("code", "kbd"):
            if self._signature_depth is None:
                self._text.append("`")
        elif tag in BLOCK_TAGS and self._row is None and self._signature_depth is None:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        """Close the element, writing the block that it held."""
        if tag in VOID or tag not in self._open:
            return
        while self._open:
            closed = self._open.pop()
            self._close(closed, len(self._open) + 1)
            if closed == tag:
                break

    def handle_data(self, data: str) -> None:
        """Keep text that stands inside the page's main part."""
        if self._reading():
            self._text.append(data)

    def _reading(self) -> bool:
        return self._main_depth is not None and self._noise_depth is None

    def _close(self, tag: str, depth: int) -> None:
        if self._main_depth == depth:
            self._flush()
            self._main_depth = None
        if self._noise_depth is not None:
            if self._noise_depth == depth:
                self._noise_depth = None
            return
        if self._main_depth is None:
            return
        if self._pre_depth is not None:
            if self._pre_depth == depth:
                self._write_code()
                self._pre_depth = None
        elif self._signature_depth is not None:
            if self._signature_depth == depth:
                signature = self._take()
                self._signature_depth = None
                if signature:
                    self.blocks.append(f"### `{signature}`")
        elif tag in HEADINGS:
            self._flush()
        elif tag in ("ul", "ol"):
            self._flush()
            if self._lists:
                self._lists.pop()
            if not self._lists:
                self._write_list()
        elif tag == "li":
            self._flush()
            if self._lists and self._lists[-1] is not None:
                self._lists[-1] += 1
        elif tag in ("td", "th"):
            if self._row is not None:
                self._row.append(self._take())
        elif tag == "tr":
            if self._row:
                self._table.append(self._row)
            self._row = None
        elif tag == "table":
            self._write_table()
        elif tag in ("code", "kbd"):
            self._text.append("`")
        elif tag in BLOCK_TAGS and self._row is None:
            self._flush()

    def _take(self) -> str:
        text = "".join(self._text).translate(PLAIN_QUOTES)
        self._text = []
        return re.sub(r"\s+", " ", text).replace("``", "").replace("§", "").strip()

    def _flush(self) -> None:
        text = self._take()
        heading, self._heading = self._heading, 0
        if not text:
            return
        if heading:
            self.blocks.append(f"{'#' * heading} {text}")
        elif self._lists:
            indent = "  " * (len(self._lists) - 1)
            number = self._lists[-1]
            bullet = "- " if number is None else f"{number}. "
            if self._list_lines and not self._list_lines[-1]:
                self._list_lines[-1] = indent + bullet + text
            else:
                self._list_lines.append(indent + "  " + text)
        elif "blockquote" in self._open:
            self.blocks.append(f"> {text}")
        else:
            self.blocks.append(text)

    def _write_code(self) -> None:
        code = "".join(self._text).translate(PLAIN_QUOTES)
        self._text = []
        lines = [line.rstrip() for line in code.split("\n")]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if not lines:
            return
        block = f"```{self._language}\n" + "\n".join(lines) + "\n```"
        if self._lists:
            self._list_lines.append(block)
        else:
            self.blocks.append(block)

    def _write_list(self) -> None:
        lines = [line for line in self._list_lines if line]
        self._list_lines = []
        if lines:
            self.blocks.append("\n".join(lines))

    def _write_table(self) -> None:
        if self._table:
            self.blocks.append("\n".join("| " + " | ".join(row) + " |" for row in self._table))
        self._table = []


def read_page(root: Path, path: str) -> list[str]:
    """The blocks of one page."""
    reader = PageReader()
    reader.feed((root / path).read_text(encoding="utf-8"))
    reader.close()
    return reader.blocks


def pages(root: Path, part: str) -> Iterator[str]:
    """Paths of the pages of one book or crate, in order."""
    for file in sorted((root / part).rglob("*.html")):
        path = file.relative_to(root)
        if path.name not in SKIPPED_PAGES and not SKIPPED_DIRS & set(path.parts):
            yield path.as_posix()


def fingerprint(block: str) -> str:
    """What two blocks share when they say the same about different numbers or number types."""
    block = re.sub(r"\b(?:[iuf](?:8|16|32|64|128)|[iu]size)\b", "int", block)
    return re.sub(r"\b\d\w*", "0", re.sub(r"\s+", " ", block)).lower()


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of eight words in the text; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()


def drop_empty_headings(blocks: list[str]) -> list[str]:
    """Leave out each heading that nothing follows before one of the same or a higher rank."""
    kept: list[str] = []
    for block in reversed(blocks):
        rank = len(block) - len(block.lstrip("#"))
        if rank and block[rank : rank + 1] == " " and "\n" not in block:
            if not kept:
                continue
            below = kept[-1]
            below_rank = len(below) - len(below.lstrip("#"))
            if below_rank and below[below_rank : below_rank + 1] == " " and below_rank <= rank:
                continue
        kept.append(block)
    return kept[::-1]


class Corpus:
    """The pre-training text: blocks that were not seen before and that stand in no text kept apart."""

    def __init__(self, apart: str) -> None:
        self._apart = shingles(apart)
        self._seen: set[str] = set()
        self.repeated = 0
        self.leaked = 0

    def document(self, blocks: list[str], shortest: int) -> str:
        """What remains of a page, or "" when that is less than a paragraph.

        A repeated block shorter than `shortest` stays: "For example:" belongs where it stands.
        """
        kept = drop_empty_headings([block for block in blocks if self._keep(block, shortest)])
        if sum(len(block) for block in kept if not block.startswith("#")) < 120:
            return ""
        return "\n\n".join(kept) + "\n"

    def _keep(self, block: str, shortest: int) -> bool:
        if block.startswith("#"):
            return True
        key = fingerprint(block)
        if len(block) >= shortest and key in self._seen:
            self.repeated += len(block)
            return False
        self._seen.add(key)
        runs = shingles(block)
        if len(block) >= SHORT and runs and 2 * len(runs & self._apart) >= len(runs):
            self.leaked += len(block)
            return False
        return True


def html_root() -> Path:
    """Where the toolchain keeps its documentation."""
    try:
        sysroot = subprocess.run(
            ["rustc", "--print", "sysroot"], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"cannot ask rustc for its sysroot: {error}; install Rust with rustup, or pass --html")
    return Path(sysroot) / "share" / "doc" / "rust" / "html"


def main() -> None:
    """Write the corpus and the texts kept apart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--html", type=Path, help="the HTML folder (default: that of the toolchain in use)")
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus.jsonl")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for heldout/ and finetune/")
    args = parser.parse_args()

    root = args.html or html_root()
    if not (root / "book").is_dir():
        sys.exit(f"no Rust documentation in {root}: run `rustup component add rust-docs`, or pass --html")

    paths = [path for part in (*BOOKS, *CRATES, FINETUNE) for path in pages(root, part)]
    with ProcessPoolExecutor() as pool:
        read = dict(zip(paths, pool.map(read_page, [root] * len(paths), paths, chunksize=32), strict=True))

    heldout = {
        name: [path for path in paths if path.startswith(starts) and len("".join(read[path])) > 200]
        for name, starts in HELDOUT.items()
    }
    for folder in (args.out, args.models / "heldout", args.models / "finetune"):
        folder.mkdir(parents=True, exist_ok=True)
    apart: list[str] = []
    for name, chapter in heldout.items():
        text = "\n".join("\n\n".join(read[path]) + "\n" for path in chapter)
        (args.models / "heldout" / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"heldout/{name}.txt: {len(chapter)} pages, {len(text.encode()):,} bytes")
        apart.append(text)

    errors = ["\n\n".join(read[path]) + "\n" for path in paths if re.fullmatch(rf"{FINETUNE}/E\d{{4}}\.html", path)]
    parts = {
        "heldout": errors[FINETUNE_HELDOUT_EVERY - 1 :: FINETUNE_HELDOUT_EVERY],
        "train": [page for i, page in enumerate(errors) if (i + 1) % FINETUNE_HELDOUT_EVERY],
    }
    for name, chosen in parts.items():
        text = "\n".join(chosen)
        (args.models / "finetune" / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"finetune/{name}.txt: {len(chosen)} pages, {len(text.encode()):,} bytes")
        apart.append(text)

    corpus = Corpus("\n".join(apart))
    held = {path for chapter in heldout.values() for path in chapter}
    sizes: dict[str, int] = {}
    with (args.out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for path in paths:
            part = path.split("/")[0]
            if part == FINETUNE or path in held:
                continue
            text = corpus.document(read[path], 0 if part in CRATES else SHORT)
            if text:
                sizes[part] = sizes.get(part, 0) + len(text.encode())
                file.write(json.dumps({"path": path, "text": text}, ensure_ascii=False) + "\n")
    for part, size in sizes.items():
        print(f"corpus {part}: {size:,} bytes")
    print(
        f"corpus: {sum(sizes.values()):,} bytes; "
        f"left out {corpus.repeated:,} characters as repeated, {corpus.leaked:,} as kept apart"
    )


if __name__ == "__main__":
    main()
