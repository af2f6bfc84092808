"""What every question to a large job store costs: an index answers it, never a walk through all jobs."""

import sqlite3
from collections.abc import Iterator

import pytest
from sqlalchemy import event, select

from core.errors import StorageFailed
from core.states import State
from store.jobs import JobStore
from store.schema import jobs

FILL = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
INSERT INTO jobs (id, number, tenant, model, created_at, state, version, ended_at, bytes, request, life)
SELECT printf('%08x-0000-4000-8000-%012x', i, i), i, 't' || (i % 10), 'm' || (i % 5), i,
       CASE i % 1000 WHEN 0 THEN 'queued' ELSE 'succeeded' END, 1, i, 1, '', '' FROM n
"""
QUESTIONS = [
    *(f"page({tenant}, {state}, {model}, 50, {before})" for tenant in ("None", "'t1'")
      for state in ("None", "State.SUCCEEDED") for model in ("None", "'m1'") for before in ("None", "middle")),
    "unfinished()", "load(middle)", "find_key('t1', 'k')", "keyed('t1', 'k')", "counts()", "kept()",
]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[JobStore]:
    database = tmp_path_factory.mktemp("large") / "jobs.sqlite"
    store = JobStore(database)
    with sqlite3.connect(database) as db:
        db.execute(FILL)
    db.close()
    yield store
    store.close()


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_to_a_hundred_thousand_jobs_is_answered_from_an_index(large, question):
    middle = "0000c351-0000-4000-8000-00000000c351"  # of t1 and m1
    asked = []

    def note(db, cursor, statement, parameters, context, many):
        asked.append((statement, parameters))

    event.listen(large._readers, "before_cursor_execute", note)
    try:
        eval(f"large.{question}", {"large": large, "State": State, "middle": middle})
    except StorageFailed:
        pass  # the rows are hollow
    finally:
        event.remove(large._readers, "before_cursor_execute", note)
    assert asked
    raw = sqlite3.connect(large._path)
    for statement, parameters in asked:
        plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        if question.startswith("page(None, None, None"):  # newest first is the table's own order
            searched = ("SEARCH jobs USING", "SCAN jobs")
        elif question in ("counts()", "kept()"):
            searched = ("SCAN jobs USING COVERING INDEX", "SEARCH facts USING")
        else:
            searched = ("SEARCH jobs USING", "USE TEMP B-TREE FOR ORDER BY")
        assert all(step.startswith(searched) for step in plan), plan
        assert question == "unfinished()" or not any("TEMP B-TREE" in step for step in plan), plan
    raw.close()


def test_a_tenants_few_failed_jobs_are_not_searched_among_all_of_its_jobs(large):
    query = select(jobs).where(jobs.c.tenant == "t1", jobs.c.state == "failed").order_by(jobs.c.seq.desc())
    with large._readers.connect() as db:
        plan = db.exec_driver_sql(f"EXPLAIN QUERY PLAN {query.compile(compile_kwargs={'literal_binds': True})}").all()
    assert [row[3] for row in plan] == ["SEARCH jobs USING INDEX jobs_tenant_state (tenant=? AND state=?)"]
