"""What happens to documents that cannot be used: stop with the first one, or leave them out and count."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from mamba_train.config_data import BadDocuments
from mamba_train.data.documents import Log
from mamba_train.data.text_files import BadDocument, TextRecord

LOGGED_PER_FILE = 5
LISTED_PER_FILE = 20


class BadDocumentFilter:
    """Passes usable documents on; applies the policy to the others.

    counts: faults by file and kind. places: of each file the first lines that were left out, with the
    reason. `option` is what messages call the policy, `share_option` the limit `max_share`.
    """

    def __init__(
        self, policy: BadDocuments, max_share: float, log: Log, option: str = "data.bad_documents",
        share_option: str = "data.max_bad_share",
    ) -> None:  # fmt: skip
        self._policy, self._max_share, self._log = policy, max_share, log
        self._option, self._share_option = option, share_option
        self.n_good: Counter[str] = Counter()
        self.counts: dict[str, Counter[str]] = {}
        self.places: dict[str, list[list[Any]]] = {}

    def usable(self, file: str, where: object, records: Iterable[TextRecord | BadDocument]) -> Iterator[TextRecord]:
        """The usable ones among the records of a file, which messages call `where`.

        Raises ValueError (FILE:LINE: reason) for the first other one if the policy is `error`.
        """
        for record in records:
            if isinstance(record, TextRecord):
                self.n_good[file] += 1
                yield record
            else:
                self.reject(file, where, record)

    def reject(self, file: str, where: object, document: BadDocument) -> None:
        """Apply the policy to one document."""
        place = f"{where}:{document.number}: {document.problem}"
        if self._policy is BadDocuments.error:
            raise ValueError(f"{place}; {self._option}=skip leaves such documents out and counts them")
        counts = self.counts.setdefault(file, Counter())
        counts[document.kind] += 1
        places = self.places.setdefault(file, [])
        if len(places) < LISTED_PER_FILE:
            places.append([document.number, document.problem])
        if counts.total() <= LOGGED_PER_FILE:
            self._log(f"WARNING: left out {place}")
        elif counts.total() == LOGGED_PER_FILE + 1:
            self._log(f"WARNING: {where}: more documents left out; they are counted")

    def totals(self) -> Counter[str]:
        """Documents left out, by kind of fault."""
        return sum(self.counts.values(), Counter())

    def check_share(self, what: str) -> None:
        """Raise ValueError if more than the allowed share of all documents was left out."""
        n_bad = self.totals().total()
        n_all = n_bad + self.n_good.total()
        if n_bad > self._max_share * n_all:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.totals().most_common())
            worst = max(self.counts, key=lambda file: self.counts[file].total())
            raise ValueError(
                f"{what}: {n_bad:,} of {n_all:,} documents cannot be used ({kinds}; most of them in {worst}), more "
                f"than {self._share_option}={self._max_share}; repair the text or allow a larger share"
            )
