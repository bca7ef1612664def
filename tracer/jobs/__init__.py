"""Long work in processes of its own: runs, explanations, probes, servers, models. Light to import; the app uses it."""

from tracer.jobs.documents import keep_documents
from tracer.jobs.jobs import Jobs
from tracer.jobs.parameters import KINDS
from tracer.jobs.record import Job, JobStatus

__all__ = ["KINDS", "Job", "JobStatus", "Jobs", "keep_documents"]
