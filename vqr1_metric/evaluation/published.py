"""Published results to stand beside measured ones, always marked as published.

Source: VisualQuality-R1, arXiv 2505.14460 v2, table 2: SRCC / PLCC, trained on KADID-10k (the last row on SPAQ too).
The released 7B checkpoint was trained on more, so its figures are not a reproduction of these rows.
"""

from __future__ import annotations

SOURCE = "arXiv 2505.14460 v2, table 2"
#: Columns, by the titles of the data sets.
SETS = ("BID", "CLIVE", "KonIQ", "SPAQ", "Liu13", "SRIQA", "Min19", "AGIQA-3K")

_ROWS = """
NIQE                             .515/.527 .450/.494 .421/.439 .676/.683 .360/.376 .557/.587 .343/.482 .533/.560
BRISQUE                          .522/.528 .314/.362 .385/.400 .614/.624 .389/.380 .482/.556 .242/.468 .497/.541
MUSIQ                            .327/.280 .284/.325 .473/.435 .720/.666 .656/.563 .404/.441 .458/.455 .494/.434
LIQE                             .677/.680 .719/.726 .684/.652 .815/.814 .797/.712 .743/.775 .646/.661 .653/.653
Q-Align                          .576/.651 .554/.643 .573/.612 .767/.779 .761/.802 .684/.713 .455/.525 .682/.705
DeQA-Score                       .702/.743 .743/.795 .677/.703 .852/.858 .785/.838 .710/.763 .643/.688 .738/.790
Qwen2.5-VL-7B                    .711/.725 .733/.760 .754/.810 .848/.854 .820/.852 .603/.653 .458/.553 .735/.810
Q-Insight                        .784/.796 .761/.795 .806/.829 .872/.872 .831/.857 .724/.798 .601/.669 .749/.810
VisualQuality-R1                 .790/.806 .750/.794 .830/.840 .875/.878 .838/.872 .756/.825 .598/.651 .775/.843
VisualQuality-R1 (KADID + SPAQ)  .811/.820 .811/.844 .855/.870 .913/.917 .845/.879 .752/.824 .588/.674 .754/.820
"""


def _parse() -> dict[str, dict[str, tuple[float, float]]]:
    table = {}
    for line in _ROWS.strip().splitlines():
        name, *cells = line.rsplit(maxsplit=len(SETS))
        pairs = [(float(srcc), float(plcc)) for srcc, plcc in (cell.split("/") for cell in cells)]
        table[name.strip()] = dict(zip(SETS, pairs, strict=True))
    return table


#: Scorer -> data set -> (SRCC, PLCC).
PUBLISHED = _parse()


def published_rows(dataset: str) -> list[tuple[str, float, float]]:
    """``(scorer, SRCC, PLCC)`` as published for a data set, in the order of the table; empty for another set."""
    return [(name, *row[dataset]) for name, row in PUBLISHED.items() if dataset in row]
