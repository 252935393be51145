"""A vision-language model's opinion, asked through any OpenAI-compatible server (vLLM, SGLang, llama.cpp, OpenAI, ...).

Each clip is one request: a picture with frames of the clip in reading order, and a question from `prompts/*.md` ("did
the robot do what it was told", "could this happen"), answered with a number from 0 to 10.
"""

import base64
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.video.sheet import evenly, grid, png

log = logging.getLogger(__name__)
PROMPTS = Path(__file__).parent / "prompts"
BUSY = (408, 409, 425, 429)  # what a server says when it may be asked again; so are all from 500 on
BEST = 10


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirects: they would carry the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Unreadable(Exception):
    """An answer without a score."""


def read_score(text: Any) -> float:
    """The score in [0, 1] of an answer: its last JSON object that has one. Unreadable if there is none in range."""
    for found in reversed(re.findall(r"\{[^{}]*\}", text if isinstance(text, str) else "")):
        try:
            value = json.loads(found)["score"]
        except (json.JSONDecodeError, KeyError):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= BEST:
            return value / BEST
    raise Unreadable(f"no score from 0 to {BEST} in {str(text)[:200]!r}")


class Vlm:
    """A filter that asks a chat model about pictures of the clip.

    url: of the server's API, e.g. "http://localhost:8000/v1"; model: its name there. question: a file of `prompts`
    ("instruction", "physics") or the path of a text of your own with {instruction} and {frames} in it.
    key_variable: the environment variable that holds the key; without it, none is sent.
    frames, columns, height: the picture. timeout: seconds a request may take; retries: of a request that failed or
    whose answer has no score, with a pause that doubles from `pause` seconds. parallel: requests under way at once.
    max_tokens: of an answer; temperature: it is asked at, 0.5 at least where an answer had no score; null leaves either
    to the server. extra: more of the request's body, e.g. {"max_completion_tokens": 4096}.

    An answer that stays unreadable abstains (nan) and is logged. ValueError: a server that cannot be reached or goes
    on failing, a request that it refuses (key, model, settings), a key that no header can carry, a question that is
    missing or has unknown fields.
    """

    needs_labels = False

    def __init__(self, *, url: str, model: str, question: str = "instruction", key_variable: str = "OPENAI_API_KEY",
                 frames: int = 8, columns: int = 4, height: int = 224, timeout: float = 60.0, retries: int = 3,
                 pause: float = 1.0, parallel: int = 4, max_tokens: int | None = 512,
                 temperature: float | None = 0.0, extra: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the VLM server's url is '{url}'; expected http://host:port/v1 or https://...")
        self.url, self.model, self.key_variable = url.rstrip("/") + "/chat/completions", model, key_variable
        self.frames, self.columns, self.height = frames, columns, height
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.parallel, self.max_tokens, self.temperature, self.extra = parallel, max_tokens, temperature, extra or {}
        path = PROMPTS / f"{question}.md"
        path = path if path.is_file() else Path(question)
        if not path.is_file():
            raise ValueError(f"the VLM question '{question}' is none of "
                             f"{', '.join(sorted(p.stem for p in PROMPTS.glob('*.md')))} and no file")  # fmt: skip
        self.name, self.question = f"vlm_{path.stem}", path.read_text()
        try:
            self.question.format(instruction="", frames=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"the VLM question {path} has a field other than {{instruction}} and {{frames}} "
                             f"({error}); write braces that are no field twice") from None  # fmt: skip
        self._opener = urllib.request.build_opener(_Stay())

    def score(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """(b,) in [0, 1], nan where no answer could be read."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return np.array(list(pool.map(self._ask, clips)), np.float64)

    def body(self, clip: Clip, *, again: bool = False) -> dict:
        """The request about one clip, as plain JSON; `again` where the last answer had no score."""
        picture = grid(clip.video, count=self.frames, columns=self.columns, height=self.height)
        shown = len(evenly(len(clip.video), self.frames))
        text = self.question.format(instruction=clip.instruction, frames=shown)
        image = "data:image/png;base64," + base64.b64encode(png(picture)).decode()
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:  # asked again in the same words at 0, a model would say the same
            body["temperature"] = max(self.temperature, 0.5) if again else self.temperature
        return {**body, **self.extra}

    def _ask(self, clip: Clip) -> float:
        reason: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            body = self.body(clip, again=isinstance(reason, Unreadable))
            try:
                return read_score(self._answer(body))
            except (Unreadable, OSError, http.client.HTTPException) as error:
                reason = error
        if isinstance(reason, Unreadable):
            log.warning("%s abstains on clip '%s': %s", self.name, clip.id, reason)
            return float("nan")
        raise ValueError(f"the VLM server at {self.url} did not answer about clip '{clip.id}' in {self.retries + 1} "
                         f"attempts ({reason}); start it, or mend the filter (url, timeout, retries). Scores so "
                         f"far are kept: the same command continues") from reason  # fmt: skip

    def _key(self) -> str:
        """The key, "" for none. ValueError for one that no header can carry, which http.client would print."""
        key = os.environ.get(self.key_variable, "").strip()
        if re.search(r"[^\x20-\x7e\xa0-\xff]", key):
            raise ValueError(
                f"the environment variable {self.key_variable} holds a character that no key has (a line "
                "break, a control character, a letter outside Latin-1); set it to the key alone"
            )
        return key

    def _answer(self, body: dict) -> Any:
        """The text of the reply. Unreadable if it is not a chat completion; OSError if it may be asked again."""
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, data=json.dumps(body).encode(), headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                data = reply.read()
        except urllib.error.HTTPError as error:
            if error.code in BUSY or error.code >= 500:
                raise OSError(f"status {error.code}") from None
            said = error.read(400).decode(errors="replace").strip()
            remedy = f"the url, the model or the key (environment variable {self.key_variable})"
            if error.code in (400, 422):
                remedy += ("; leave out settings that it does not take (max_tokens=null, temperature=null), and send "
                           "what it wants by `extra`, e.g. {max_completion_tokens: 4096}")  # fmt: skip
            raise ValueError(f"the VLM server at {self.url} refuses the request for model '{self.model}' with status "
                             f"{error.code}: {said}. Mend {remedy}.") from None  # fmt: skip
        try:
            return json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise Unreadable(f"the reply is no chat completion: {data[:200]!r}") from None
