"""Text to evaluate on that comes with msquant or with Python, and that calibration does not see.

Six domains of the kinds that models read:

- docs: the half of `pydoc_data.topics` that calibration leaves out, technical English.
- code: modules of the standard library that calibration does not take, Python source.
- chinese, dialogue, fiction, math: written for msquant, on other subjects than calibration's texts.
  The dialogue is plain text here, so that its score is that of any tokenizer.
"""

from msquant.calibration.builtin import evaluation_texts, module_source, shipped_dialogue, shipped_text
from msquant.calibration.domains import Domain
from msquant.calibration.rows import RowText

CODE_MODULES = ("calendar", "configparser", "shutil", "zipfile")


def evaluation_domains() -> list[Domain]:
    """The builtin evaluation text; see the module's docstring for what it is made of.

    Raises:
        CalibrationError: a part of the Python installation that holds some of it is missing.
    """
    return [
        Domain("docs", 1, evaluation_texts()),
        Domain("code", 1, [module_source(name) for name in CODE_MODULES]),
        Domain("chinese", 1, [shipped_text("evaluation", "chinese.txt")]),
        Domain("dialogue", 1, shipped_dialogue("evaluation", RowText())[0]),
        Domain("fiction", 1, [shipped_text("evaluation", "fiction.txt")]),
        Domain("math", 1, [shipped_text("evaluation", "mathematics.txt")]),
    ]
