"""20,000 requests that no client sends, always the same ones; `python3 tests/fuzz.py --count N` throws others, and more."""

import fuzz


def test_twenty_thousand_odd_requests_change_nothing_but_what_was_accepted(tmp_path):
    statuses = fuzz.fuzz(20000, 5, str(tmp_path))
    assert {200, 204, 400, 401, 403, 404, 405, 411} <= set(statuses)  # each kind was tried
    assert statuses[200] > 500
