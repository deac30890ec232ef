"""The compressed-tensors checkpoint of vLLM, of msquant or of another tool, read as a `WeightSource`."""

from pathlib import Path

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import Linear
from msquant.errors import CheckpointError
from msquant.formats.compressed_tensors import packed
from msquant.formats.compressed_tensors.layout import decode_linear
from msquant.formats.compressed_tensors.rules import check_layout, parts_of
from msquant.formats.compressed_tensors.section import Section, read_section
from msquant.formats.stored import FolderSource


class CompressedTensorsCheckpoint(FolderSource):
    """A written folder as a `WeightSource`: quantized layers as they will be computed, the rest as float32.

    Attributes:
        section: what its `config.json` says of the quantization.
    """

    def __init__(self, checkpoint: Checkpoint, section: Section) -> None:
        super().__init__(checkpoint)
        self.section = section

    @classmethod
    def open(cls, folder: Path | str) -> "CompressedTensorsCheckpoint":
        """Open a folder without validating it; `CompressedTensorsFormat.validate` does that.

        Raises:
            CheckpointError: as `Checkpoint.open` and `read_section`.
        """
        folder = Path(folder)
        try:
            section = read_section(read_json(folder / "config.json"))
        except CheckpointError as error:
            raise CheckpointError(error.what, where=folder / "config.json", remedy=error.remedy) from error
        return cls(Checkpoint.open(folder), section)

    def linear(self, module: str) -> Linear:
        """Return the layer `module`.

        Raises:
            CheckpointError: a part is missing, or of a dtype or shape that does not fit; the weights of a
                layer with int8 inputs are asymmetric.
        """
        group = self.section.group(module)
        if group is None:
            return self.checkpoint.linear(module)
        parts = self.parts(module, parts_of(group), check_layout(self.checkpoint, module, group))
        if packed.is_packed(group.scheme):
            return packed.decode_linear(module, parts, group.scheme)
        # Tools that store it at all store zeros.
        if (zero_point := f"{module}.weight_zero_point") in self and self.checkpoint.raw(zero_point).any():
            raise CheckpointError(
                f"{zero_point} is not zero: asymmetric weights are not computed",
                where=self.checkpoint.folder,
                remedy="quantize again with symmetric weights, as vLLM takes them to be",
            )
        return decode_linear(module, parts, group.scheme)
