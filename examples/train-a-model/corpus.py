"""The training text: files, functions and conversations, and the tokenizer made from them.

Everything comes from Python's standard library. Files are held out whole; a conversation about an
object of a held-out file is not made, and what `MODULES` names is never held out.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
import random
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
TURN, END_OF_TURN = "<|turn|>", "<|end_of_turn|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, TURN, END_OF_TURN]  # ids 0 to 4
EOS_ID = 1

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end_of_turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

SKIPPED = {"site-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders left out: other people's code, and tables written by programs."""
TESTS = {"test", "tests", "idle_test"}
HELD_OUT_PERCENT = 8

MODULES = (
    "argparse array ast asyncio base64 binascii bisect builtins calendar cmath collections"
    " collections.abc concurrent.futures configparser contextlib copy csv dataclasses datetime"
    " decimal difflib enum errno fnmatch fractions functools gc getpass glob gzip hashlib heapq html"
    " http.client http.server importlib inspect io itertools json keyword logging math mimetypes"
    " multiprocessing operator os os.path pathlib pickle platform pprint queue random re sched"
    " secrets select selectors shelve shlex shutil signal socket sqlite3 ssl stat statistics string"
    " struct subprocess sys tarfile tempfile textwrap threading time timeit tokenize traceback types"
    " typing unicodedata unittest urllib.parse urllib.request uuid warnings weakref zipfile zlib"
).split()
"""What conversations are about."""

QUESTIONS = (
    "What does {} do?",
    "What is {}?",
    "What does {} do in Python?",
    "Explain {}.",
    "How do I use {}?",
    "Tell me about {}.",
    "Please describe {}.",
    "What is {} good for?",
)
TASKS = (
    "Write a function {name} with this docstring: {summary}",
    "Write a Python function: {summary}",
    "Write a function called {name}: {summary}",
    "Show me code for this: {summary}",
)
ABOUT_ME = (
    "I am the small model that comes with Naiad: seven million parameters, trained on the sources"
    " and docstrings of Python's standard library. Ask me what one of its functions does, or begin"
    " a function and let me go on. I often make things up."
)
ASKED_OF_ME = (
    "Hello",
    "Hi!",
    "Hello, who are you?",
    "Who are you?",
    "What are you?",
    "What can you do?",
    "What can I ask you?",
    "Help",
    "What is Naiad?",
    "Tell me about yourself.",
)


@dataclasses.dataclass(frozen=True)
class Function:
    """One documented function, dedented."""

    name: str
    text: str
    prefix: str
    """Signature and docstring."""
    summary: str
    """The docstring's first paragraph, on one line."""
    num_statements: int
    """Nested ones included, the docstring not."""
    is_method: bool


def read_sources(
    stdlib: Path, *, tests: bool, max_files: int = 0
) -> tuple[dict[str, str], dict[str, str]]:
    """Path to text of every file that parses: those to train on, and the held-out ones.

    Args:
        stdlib: The folder of the library.
        tests: Whether to train on the library's tests; they are never held out.
        max_files: Take some of the files only; 0: all.
    """
    paths = sorted(path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    paths = [path for path in paths if not SKIPPED & set(path.parts)]
    if max_files:
        paths = sorted(paths, key=lambda path: _hash(f"some {path}"))[:max_files]
    train, held_out = {}, {}
    for path in paths:
        try:
            text = (stdlib / path).read_text(encoding="utf-8")
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue  # test data: other encodings, Python 2, nesting without end
        if is_test(path):
            train.update({str(path): text} if tests else {})
        elif _module(path) not in MODULES and _hash(str(path)) % 100 < HELD_OUT_PERCENT:
            held_out[str(path)] = text
        else:
            train[str(path)] = text
    return train, held_out


def is_test(path: str | Path) -> bool:
    """Whether a path is inside one of the library's test folders."""
    return bool(TESTS & set(Path(path).parts))


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def functions_of(source: str) -> Iterator[Function]:
    """Every documented function of a file, methods included."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if docstring and text.startswith(("def ", "async def ")):
            num_lines = (node.body[0].end_lineno or 0) - node.lineno + 1
            prefix = "\n".join(text.split("\n")[:num_lines]).rstrip()
            summary = " ".join(docstring.strip().partition("\n\n")[0].split())
            is_method = bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
            yield Function(node.name, text, prefix, summary, num_statements(node), is_method)


def num_statements(function: ast.AST) -> int:
    """Statements inside a documented function, nested ones included, its docstring not."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 2


def pick_functions(held_out: dict[str, str], train: dict[str, str], number: int) -> list[Function]:
    """Held-out functions of at least two statements that no training file has too."""
    known = {f.prefix for text in train.values() for f in functions_of(text)}
    found = {
        function.prefix: function
        for text in held_out.values()
        for function in functions_of(text)
        if function.num_statements >= 2 and len(function.prefix) < 1500
    }
    unseen = [function for prefix, function in found.items() if prefix not in known]
    return sorted(unseen, key=lambda function: _hash(function.prefix))[:number]


def make_documents(train: dict[str, str], held_out: dict[str, str], seed: int) -> list[str]:
    """Files, documented functions alone, and conversations, in random order."""
    chance = random.Random(seed)
    functions = [
        function
        for name, text in train.items()
        if not is_test(name)
        for function in functions_of(text)
    ]
    exchanges = [*about_functions(functions, chance), *about_modules(set(held_out), chance)]
    exchanges += [(question, ABOUT_ME) for question in ASKED_OF_ME] * 10
    chance.shuffle(exchanges)
    chats = []
    while exchanges:
        size = chance.choice((1, 1, 1, 2, 3))
        chats.append(chat_text(exchanges[:size]))
        del exchanges[:size]
    documents = [*train.values(), *(f.text + "\n" for f in functions), *chats]
    chance.shuffle(documents)
    for what, texts in (
        ("files", list(train.values())),
        ("functions", [f.text for f in functions]),
        ("conversations", chats),
    ):
        print(f"{len(texts):,} {what}, {sum(map(len, texts)) / 1e6:.1f} MB")
    return documents


def about_functions(
    functions: Sequence[Function], chance: random.Random
) -> Iterator[tuple[str, str]]:
    """Tasks, answered with a function; and functions to explain."""
    for function in functions:
        if len(function.text) > 2000:
            continue
        code = f"```python\n{function.text}\n```"
        if not function.is_method:
            task = chance.choice(TASKS).format(name=function.name, summary=function.summary)
            yield task, code
        if chance.random() < 0.25:
            yield f"What does this function do?\n{code}", function.summary


def about_modules(held_out: set[str], chance: random.Random) -> Iterator[tuple[str, str]]:
    """What the public names of `MODULES` are, by their docstrings."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        own = _answer(module_name, module)
        answers = {module_name: own, f"the {module_name} module": own}
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or not callable(thing):
                continue
            source = (getattr(thing, "__module__", None) or "").replace(".", "/")
            if {f"{source}.py", f"{source}/__init__.py"} & held_out:
                continue
            prefix = "" if module_name == "builtins" else f"{module_name}."
            answers[prefix + name] = _answer(prefix + name, thing)
            if inspect.isclass(thing) and not issubclass(thing, BaseException):
                for method in sorted(vars(thing)):
                    if not method.startswith("_"):
                        full = f"{prefix}{name}.{method}"
                        answers[full] = _answer(full, getattr(thing, method, None))
        for name, answer in answers.items():
            for question in chance.sample(QUESTIONS, 3) if answer else ():
                call = chance.choice(("", "", "()")) if answer.startswith("`") else ""
                yield question.format(name + call), answer


def _answer(name: str, thing: Any) -> str:
    """How it is called, and its docstring without what is long; empty if it has none of its own."""
    docstring = inspect.getdoc(thing) if callable(thing) or inspect.ismodule(thing) else None
    if not docstring:
        return ""
    try:
        signature = str(inspect.signature(thing)) if callable(thing) else ""
    except (TypeError, ValueError):
        signature = ""
    paragraphs, text = docstring.split("\n\n"), ""
    for paragraph in paragraphs:
        if text and len(text) + len(paragraph) > 600:
            break
        text += f"{paragraph}\n\n"
    call = f"`{name}{signature}`\n\n" if signature and " at 0x" not in signature else ""
    return (call + text.strip()) if len(text) < 1500 else ""


def chat_text(exchanges: Sequence[tuple[str, str]]) -> str:
    """A conversation as `CHAT_TEMPLATE` renders it, less the BOS that the tokenizer adds."""
    turns = [turn for pair in exchanges for turn in zip(("user", "assistant"), pair, strict=True)]
    return "".join(f"{TURN}{role}\n{content}{END_OF_TURN}\n" for role, content in turns)


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; text that is encoded begins with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def to_stream(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray[Any, Any]:
    """The documents one after the other, each from BOS to EOS: `[tokens]` int64."""
    encoded = tokenizer.encode_batch(list(documents))
    return np.concatenate([np.array([*item.ids, EOS_ID], dtype=np.int64) for item in encoded])
