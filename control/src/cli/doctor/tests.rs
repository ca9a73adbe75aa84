//! Tests of the judgements and of the report.
