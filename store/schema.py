"""The tables of the job database, their indexes, and the way from an older schema to this one (forward only)."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    func,
    insert,
    inspect,
    select,
    update,
)

from core.errors import StorageFailed

metadata = MetaData()
_Number = BigInteger().with_variant(Integer, "sqlite")

# `seq` is the order of acceptance: it never repeats and, unlike the clock, never goes back.
jobs = Table(
    "jobs",
    metadata,
    Column("seq", _Number, primary_key=True, autoincrement=True),
    Column("id", String, nullable=False, unique=True),
    Column("number", _Number, nullable=False),
    Column("tenant", String, nullable=False),
    Column("model", String, nullable=False),
    Column("idempotency_key", String),
    Column("fingerprint", String),
    Column("created_at", Double, nullable=False),
    Column("state", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("ended_at", Double),
    Column("bytes", _Number, nullable=False),
    Column("request", Text, nullable=False),
    Column("life", Text, nullable=False),
    sqlite_autoincrement=True,
)
_keyed = jobs.c.idempotency_key.is_not(None)
Index("jobs_key", jobs.c.tenant, jobs.c.idempotency_key, unique=True, sqlite_where=_keyed, postgresql_where=_keyed)
Index("jobs_tenant", jobs.c.tenant, jobs.c.seq)
Index("jobs_tenant_state", jobs.c.tenant, jobs.c.state, jobs.c.seq)
Index("jobs_state", jobs.c.state, jobs.c.seq)
Index("jobs_model", jobs.c.model, jobs.c.seq)
Index("jobs_kept", jobs.c.ended_at, jobs.c.id, jobs.c.bytes)

# Whole numbers that outlive the jobs: `schema`, `last_number` (the highest job number ever inserted), and
# `past_{state}` (how many jobs ended so that have no row any more).
facts = Table("facts", metadata, Column("name", String, primary_key=True), Column("value", _Number, nullable=False))

# Upgrade i is the SQL that leads from schema i + 1 to schema i + 2. Append only; a new database starts at the newest.
UPGRADES: list[tuple[str, ...]] = []


def prepare(db: Connection) -> None:
    """Create the tables, or bring an older database up. Raises `StorageFailed` for one that a newer server wrote."""
    newest = 1 + len(UPGRADES)
    if not inspect(db).has_table(facts.name):
        metadata.create_all(db)
        db.execute(insert(facts), [{"name": "schema", "value": newest}, {"name": "last_number", "value": 0}])
        return
    version = db.execute(select(func.max(facts.c.value)).where(facts.c.name == "schema")).scalar_one()
    if version is None or version > newest:
        raise StorageFailed(
            f"the job database has schema {version}, this server knows up to {newest}; start the newer server, "
            "or move the outputs folder aside to begin anew"
        )
    for upgrade in UPGRADES[version - 1 :]:
        for statement in upgrade:
            db.exec_driver_sql(statement)
    db.execute(update(facts).where(facts.c.name == "schema").values(value=newest))
