"""One process's part of a merge that another process drives: met, carried out, and the end awaited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from pathlib import Path

from pma.engine import provenance
from pma.engine.attempt import of_ours
from pma.engine.building import SAVE_SECONDS, kept_up
from pma.engine.journal import JOURNAL_FILE, Followed, driver_journal, part_journal
from pma.engine.lease import is_gone, this_process
from pma.engine.partition import Part
from pma.engine.plan import Plan
from pma.engine.stopping import StopFlag
from pma.engine.stream import Digests, Output, Progress, stream
from pma.engine.together.crew import Crew
from pma.engine.together.hands import FolderHand, Hand, SendingHand, local_folder
from pma.engine.together.places import Arrived, driver_at, is_made, look_anew, meeting_folder, speak
from pma.engine.together.views import difference, view
from pma.engine.together.words import failure_in, said_by, tell_failure
from pma.engine.work import work_of
from pma.errors import Interrupted, MismatchError, PmaError, UsageError
from pma.remote import RemotePath

_TOKEN_CHARACTERS = 8
_KEPT = "what this process finished is kept, and the same command goes on with it"


def pauses(longest: float = 1.0, *, shortest: float = 0.005) -> Iterator[float]:
    """Seconds between looks: short at first, as most waits are, and about a fifth of the wait so far."""
    pause = shortest
    while True:
        yield pause
        pause = max(min(1.25 * pause, longest), shortest)


class Place:
    """Where processes that make an output meet under the lease with `token`, for one who does not hold it."""

    def __init__(self, out: Path, token: str, *, silent_seconds: float) -> None:
        self.out, self.token = out, token
        self.folder = meeting_folder(out)
        self._silent_seconds = silent_seconds
        self._driver = Followed(self.folder / driver_journal(token), hold=True)
        self._beat, self._beat_at = -1, time.monotonic()

    def driver(self) -> Followed:
        """What the process that drives says, up to now."""
        look_anew(self.folder)
        self._driver.news()
        return self._driver

    def check_called_off(self, name: str) -> None:
        """Raises Interrupted where the driver, as it was last heard, told us, called `name`, to stop."""
        if name in self._driver.said.get("called_off", ()):
            raise Interrupted("called off: no sign of life was seen for long, and another makes this part")

    def check_words(self) -> None:
        """Raises Interrupted where the driver said that it failed."""
        failed = failure_in(self.driver().said)
        if failed is not None:
            raise Interrupted(f"called off: {failed}")

    def check(self) -> None:
        """Raises Interrupted where the merge does not go on, or no sign of its driver was seen for long."""
        self._judge(*driver_at(self.folder))

    def _judge(self, holder: Mapping[str, str], beat: int) -> None:
        gone = is_gone(holder)  # before its last words are heard
        self.check_words()
        if holder.get("token") != self.token or "released" in holder:
            raise Interrupted(
                f"called off: the merge to {self.out} goes on without this process, or not at all"
            )
        now = time.monotonic()
        if beat != self._beat:
            self._beat, self._beat_at = beat, now
        if gone or now - self._beat_at > self._silent_seconds:
            what = "the end" if gone else f"no sign for {now - self._beat_at:.0f} s"
            raise Interrupted(
                f"{what} of process {holder.get('pid', '?')} on {holder.get('host', '?')}, which drives the "
                f"merge to {self.out}; {_KEPT}"
            )

    def await_end(self) -> None:
        """Return when the output is there. Raises Interrupted where it will not be."""
        # over a network the new name may be seen later than the old one goes; in a store it is not so
        patience = 0.0 if isinstance(self.folder, RemotePath) else self._silent_seconds
        gone_at: float | None = None
        for pause in pauses():
            holder, beat = driver_at(self.folder)
            if is_made(self.out):  # looked for after who drives, who goes when it is
                return
            if not holder and gone_at is None:
                gone_at = time.monotonic()
            try:
                self.check_words()
                if holder or (gone_at is not None and time.monotonic() - gone_at >= patience):
                    self._judge(holder, beat)
            except Interrupted:
                if is_made(self.out):  # whoever drives made it and ended, just now
                    return
                raise
            time.sleep(pause)

    def close(self) -> None:
        """Follow the driver no more."""
        self._driver.close()


class Beating:
    """Shows that a process lives while it saves nothing."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self.save = beat


class Working:
    """A process's own journal and hand on the files at a place, from `__init__` to `close`; `take` a plan
    before anything else.

    Raises UsageError where another process has that name already.
    """

    plan: Plan

    def __init__(self, place: Place, name: str, who: str) -> None:
        self._place, self._name, self._who = place, name, who
        try:
            self._journal = speak(place.folder, part_journal(place.token, name))
            self._journal.beat()  # in a store it is there with its first words only
        except FileExistsError:
            raise UsageError(
                f"{who}: another process is {name} of the merge to {place.out}; is it started twice?"
            ) from None
        except OSError as error:
            raise said_by(who, of_ours(error, place.folder)) from error
        self._hand: Hand | None = None
        self._called_off = StopFlag()
        self._read = 0
        self._output = Output(part=None)

    def take(self, plan: Plan) -> None:
        """Say what we are to make."""
        self.plan = plan
        told = {"who": self._who, "process": this_process()}
        self._journal.start({"plan": provenance.heading(plan), **told})

    def agree(self) -> None:
        """Check that this process plans as the driver does, and tell it. Raises MismatchError."""
        heading = self._place.driver().heading
        assert heading is not None
        found = difference(view(self.plan), heading["view"], me=self._who, them=heading["who"])
        if found is not None:
            raise MismatchError(f"{found}; nothing was written. Start again where all see the same files")
        self._journal.say(agrees=True)

    def carry_out(
        self,
        part: Part,
        *,
        progress: Progress | None = None,
        save_seconds: float = SAVE_SECONDS,
        staging: Path | None = None,
        sha256: bool = False,
        called_off: StopFlag | None = None,
    ) -> Digests:
        """Make the blocks of a part and journal them; returns those that were made here. Raises Interrupted
        where `called_off` was set meanwhile. `sha256`: of each file that is sent to a store, too.
        """
        done = self._done_before()
        with self.beating(save_seconds):  # where a killed process left much, that is removed first
            self._hand = self._hand_for(part, staging, sha256=sha256)
        output = self._output = Output(part=self._hand, digests=dict(done))
        stop, self._called_off = StopFlag(), called_off or self._called_off

        def count(read: int, written: int) -> None:
            self._read += read
            if progress is not None:
                progress(read, written)

        with kept_up([self], stop, save_seconds):
            if len(part):
                stream(work_of(self.plan), [output], numbers=part, progress=count, stop=stop)
        self.save()
        for pause in pauses():
            if self._hand.is_settled:
                break
            time.sleep(pause)
            self.save()
        with self.beating(save_seconds):
            provenance.check_unchanged(self.plan)
        self._journal.say(done=True)
        return {chunk: digest for chunk, digest in output.digests.items() if chunk not in done}

    def _done_before(self) -> Digests:
        """What others finished before, or an earlier try at this part; for a store, parts have none of it."""
        folder = self._place.folder
        return {} if isinstance(folder, RemotePath) else Followed(folder / JOURNAL_FILE).news()

    def _hand_for(self, part: Part, staging: Path | None, *, sha256: bool) -> Hand:
        place = self._place
        # what is opened, or sent, while the lease is the driver's is the driver's too, whatever comes after
        if not isinstance(place.out, RemotePath):
            return FolderHand(place.folder, self._check)
        local = local_folder(place.out, f"{place.token[:_TOKEN_CHARACTERS]}-{self._name}", staging)
        return SendingHand(self.plan, part, place.out, local, self._check, sha256=sha256)

    def _check(self) -> None:
        """Raises Interrupted where this part, or the merge, does not go on here."""
        self._place.check()
        self._place.check_called_off(self._name)

    @property
    def sent(self) -> Mapping[str, Arrived]:
        """Files that were sent to a store, and what they were when they arrived."""
        return {} if self._hand is None else self._hand.sent

    def show_life(self) -> None:
        """Let the driver see that we live."""
        self._journal.beat()

    def beating(self, seconds: float) -> AbstractContextManager[None]:
        """In the block, which may take long and saves nothing, show that we live."""
        return kept_up([Beating(self.show_life)], StopFlag(), seconds)

    def save(self) -> None:
        """See to it that what is written is safe, then say so in the journal; show that we live, and see that
        all goes on.
        """
        if self._called_off.is_set():
            raise Interrupted("called off")
        self._check()
        self.show_life()
        new, read = self._output.taken(), self._read
        if self._hand is not None and (safe := self._hand.settle(new)):
            sent = {"sent": dict(self._hand.sent)} if self._hand.sent else {}
            self._journal.add(safe, read=read, **sent)

    def failed(self, error: BaseException) -> BaseException:
        """Tell the driver; returns what to raise: where the merge was called off before, that."""
        try:
            self._check()
        except PmaError as called_off:
            if not isinstance(error, (UsageError, MismatchError)):
                return called_off
        if isinstance(error, OSError):
            error = of_ours(error, self._place.out)
        tell_failure(self._journal, error)
        return said_by(self._who, error) if isinstance(error, PmaError) else error

    def close(self) -> None:
        """Let go of the files."""
        if self._hand is not None:
            self._hand.close()
        self._journal.close()


def carry_out(
    make_plan: Callable[[], Plan],
    part: Part,
    out: Path,
    token: str,
    *,
    name: str,
    who: str,
    silent_seconds: float = Crew.silent_seconds,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
    staging: Path | None = None,
    sha256: bool = False,
) -> Digests:
    """Carry out one part of a merge whose driver holds the lease with `token`, in any process that sees its
    folder; returns the chunks that were made and journaled.

    `make_plan` gives the plan; that we began is seen before. `name`: of this attempt at the part, and of no
    other, also where a part is tried again. Raises MismatchError where this process plans another merge,
    Interrupted where the driver is gone.
    """
    with (
        closing(Place(out, token, silent_seconds=silent_seconds)) as place,
        closing(Working(place, name, who)) as working,
    ):
        with working.beating(save_seconds):
            plan = make_plan()
        working.take(plan)
        try:
            working.agree()
            return working.carry_out(
                part, progress=progress, save_seconds=save_seconds, staging=staging, sha256=sha256
            )
        except BaseException as error:
            raise working.failed(error) from error
