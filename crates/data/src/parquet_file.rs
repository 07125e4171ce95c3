//! Parquet files, a batch of rows at a time.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};

use crate::error::DataError;
use crate::rows::{Position, Sink};
use crate::table;

const KIND: &str = "Parquet";

/// Rows decoded at once.
const BATCH_ROWS: usize = 256;

/// Hands every row to `sink`.
pub(crate) fn read(
    file: &Arc<Path>,
    open: File,
    position: &Position,
    sink: &mut Sink<'_>,
) -> Result<(), DataError> {
    let bytes = open.metadata().map_or(0, |metadata| metadata.len());
    let builder = table::decode(file, KIND, || {
        ParquetRecordBatchReaderBuilder::try_new(open).map_err(|error| error.to_string())
    })?;
    let rows = builder.metadata().file_metadata().num_rows().max(1) as f64;
    let groups = builder.metadata().row_groups().iter();
    let columns = groups.flat_map(RowGroupMetaData::columns);
    for codec in columns.map(ColumnChunkMetaData::compression) {
        let known = matches!(
            codec,
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)
        );
        if !known {
            return Err(DataError::Input {
                path: file.to_path_buf(),
                reason: format!("is compressed with {codec}"),
                cure: "write it with snappy, zstd or no compression".into(),
            });
        }
    }
    let mut reader = table::decode(file, KIND, || {
        let built = builder.with_batch_size(BATCH_ROWS).build();
        built.map_err(|error| error.to_string())
    })?;
    let mut before = 0;
    loop {
        let next = table::decode(file, KIND, || {
            reader.next().transpose().map_err(|error| error.to_string())
        })?;
        let Some(batch) = next else {
            return Ok(());
        };
        table::rows(file, before, &batch, sink)?;
        before += batch.num_rows();
        position.set((bytes as f64 * before as f64 / rows) as u64);
    }
}
