"""IU-Xray: reports join their images, frontal first; reports without either are named."""

from __future__ import annotations

import pytest

from data_prep.sources.iu_xray import SOURCE
from infimed_jax.data.sample import Skipped

REPORTS = """uid,MeSH,Problems,image,indication,comparison,findings,impression
1,normal,normal,Xray,XXXX,None,"The heart is normal.
No effusion.",Normal chest.
2,x,x,Xray,XXXX,None,,Impression only.
3,x,x,Xray,XXXX,None,,
1,normal,normal,Xray,XXXX,None,Again.,Again.
4,x,x,Xray,XXXX,None,No images.,None.
5,x,x,Xray,XXXX,None,File missing.,None.
broken
"""
PROJECTIONS = """uid,filename,projection
1,1_IM-0001-3001.dcm.png,Lateral
1,1_IM-0001-4001.dcm.png,Frontal
2,2_IM-0652-1001.dcm.png,Frontal
5,5_IM.dcm.png,Frontal
one,column,too,many
"""


@pytest.mark.parametrize("place", ["images/images_normalized", "images"])
def test_reports_with_their_images(tmp_path, place):
    (tmp_path / "indiana_reports.csv").write_text(REPORTS)
    (tmp_path / "indiana_projections.csv").write_text(PROJECTIONS)
    (tmp_path / place).mkdir(parents=True)
    for name in ("1_IM-0001-3001", "1_IM-0001-4001", "2_IM-0652-1001"):
        (tmp_path / place / f"{name}.dcm.png").write_bytes(name.encode())
    first, second, *rest = SOURCE.read(tmp_path, "all")
    assert first.images == (b"1_IM-0001-4001", b"1_IM-0001-3001")
    report = "\nFindings: The heart is normal.\nNo effusion.\nImpression: Normal chest."
    assert first.kind == "document" and first.chunks[0] == (0, 1, report)
    assert second.chunks[0] == (0, "\nImpression: Impression only.")
    assert [(record.reason, record.detail) for record in rest if isinstance(record, Skipped)] == [
        ("no text", "3"),
        ("duplicate id", "1"),
        ("image missing", "4"),
        ("image missing", "5_IM.dcm.png"),
        ("wrong number of columns", "indiana_reports.csv line 9"),
        ("wrong number of columns", "indiana_projections.csv line 6"),
    ]
