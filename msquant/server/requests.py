"""What clients may ask for: the bodies of OpenAI's completions and chat completions, and what is refused."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from msquant.inference.chat_template import Message
from msquant.inference.engine_protocol import Sampling

MAX_PROMPTS = 128
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 5
MAX_TOP_LOGPROBS = 20

# Parameters of OpenAI's and vLLM's that change nothing at these values, and are refused by name at others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
# Of a turn that an earlier answer gave.
_NEUTRAL_MESSAGE = ("name", "refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id")


def _whole_characters(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("unicode", "the text is not valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
StopString = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(_whole_characters)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    """A last event has the numbers of tokens."""


class _Request(_Strict):
    model: str | None = None
    """The one that answers, if it is named at all."""
    max_tokens: int | None = Field(None, ge=1)
    """Of the answer; as many as fit if it is not given."""
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    """0 takes the most probable token; 1 if it is not given."""
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    """Samples from the most probable tokens that together reach this probability; 1 if it is not given."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """The same seed gives the same text; another one each time if it is not given."""
    stop: Annotated[
        list[StopString],
        Field(max_length=MAX_STOPS),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value or []),
    ] = []
    """One or several texts before which the answer ends."""
    stream: bool | None = None
    """Server-sent events, as the tokens come."""
    stream_options: StreamOptions | None = None
    """How a stream ends: with the numbers of tokens or without."""
    ignore_eos: bool | None = None
    """Go on after the token that ends a text; vLLM's."""
    user: str | None = None
    """Has no effect."""

    usual_tokens: ClassVar[int | None] = None
    """Of an answer for which the client gives no number; None is as many as fit."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() & _NEUTRAL.keys():
            value = data[name]
            neutral = [x for x in _NEUTRAL[name] if type(x) is type(value) and x == value]
            if value is not None and not neutral:
                raise PydanticCustomError("unsupported", "'{name}' is not supported here", {"name": name})
        return {name: value for name, value in data.items() if name not in _NEUTRAL}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens the client asked for."""
        return self.max_tokens

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def alternatives(self) -> int | None:
        """So many of the most probable tokens beside each, with log probabilities; None is without any."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, seed: int) -> Sampling:
        """OpenAI's defaults where nothing is asked for: temperature and top_p are 1.

        Args:
            max_tokens: so many tokens at most.
            seed: used if the client gives none.
        """
        # Without new tokens the prompt's are all that is computed.
        prompt_logprobs = self.alternatives if max_tokens else self.alternatives or 0
        return Sampling(
            max_tokens,
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            seed if self.seed is None else self.seed,
            bool(self.ignore_eos),
            tuple(self.stop),
            self.alternatives,
            prompt_logprobs if self.echoes else None,
        )


class CompletionRequest(_Request):
    """The body of `/v1/completions`."""

    prompt: Any
    """A text, token ids, or a list of either."""
    echo: bool | None = None
    """Begin the answer with the prompt."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """The log probability of each token, and those of so many of the most probable ones."""
    max_tokens: int | None = Field(None, ge=0)
    """16 if it is not given; 0 only with echo."""

    usual_tokens = 16

    @property
    def echoes(self) -> bool:
        """See `_Request.echoes`."""
        return bool(self.echo)

    @property
    def alternatives(self) -> int | None:
        """See `_Request.alternatives`."""
        return self.logprobs

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "'max_tokens' may be 0 only with 'echo'")
        return self

    @model_validator(mode="after")
    def _check_prompt(self) -> "CompletionRequest":
        prompt = self.prompt
        if not isinstance(prompt, str | list) or not prompt:
            raise PydanticCustomError("prompt", "'prompt' must be a text or a list, and not empty")
        if len(self.prompts) > MAX_PROMPTS:
            raise PydanticCustomError(
                "prompt", "'prompt' holds {count} prompts, the limit is {limit}", _counts(self.prompts)
            )
        for one in self.prompts:
            tokens = isinstance(one, list) and all(type(token) is int for token in one)
            if not one or not (isinstance(one, str) or tokens):
                raise PydanticCustomError(
                    "prompt",
                    "'prompt' must be a text, a list of texts, a list of token ids or a list of such lists, "
                    "none of them empty",
                )
            if isinstance(one, str):
                _whole_characters(one)
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids."""
        single = isinstance(self.prompt, str) or type(self.prompt[0]) is int
        return [self.prompt] if single else list(self.prompt)


def _counts(prompts: list[Any]) -> dict[str, Any]:
    return {"count": len(prompts), "limit": MAX_PROMPTS}


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn; `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
    ]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if not (k in _NEUTRAL_MESSAGE and v in (None, [], ""))}

    def turn(self) -> Message:
        """As the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(_Request):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The turns so far, the oldest first."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """The log probability of each token of the answer."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Those of so many of the most probable tokens beside it."""

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")
        return self

    @property
    def alternatives(self) -> int | None:
        """See `_Request.alternatives`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """How many tokens the client asked for, by either name."""
        return self.max_completion_tokens or self.max_tokens
