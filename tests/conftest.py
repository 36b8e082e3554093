"""What every test run shares."""

# Its plugin imports it lazily, at the latest for the summary: then what grpc left behind is collected in the
# middle of the import, which CPython 3.11 answers with a SystemError now and then.
import hypothesis as hypothesis
