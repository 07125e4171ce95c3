//! Clients of object stores, one for each bucket that a process uses: credentials and options come from the environment
//! (`AWS_*`, `GOOGLE_*`, `AZURE_*`, as the builders of the crate `object_store` document) and are never logged.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use object_store::{
    ClientConfigKey, Error, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    memory::InMemory,
};

use crate::location::{RemoteUrl, Scheme};

/// One request: a part of 16 MiB at 0.3 MB/s.
const REQUEST_TIMEOUT: &str = "60s";
const CONNECT_TIMEOUT: &str = "10s";

/// Answers that ask for patience (429, 5xx) and broken connections are tried again, less and less often.
fn retry() -> RetryConfig {
    RetryConfig {
        max_retries: 8,
        retry_timeout: Duration::from_mins(3),
        ..RetryConfig::default()
    }
}

/// The client of the URL's bucket. Objects in memory live as long as the process.
pub(super) fn client(url: &RemoteUrl) -> Result<Arc<dyn ObjectStore>, Error> {
    type Clients = Mutex<HashMap<(Scheme, String), Arc<dyn ObjectStore>>>;
    static CLIENTS: OnceLock<Clients> = OnceLock::new();
    let mut clients = CLIENTS
        .get_or_init(Clients::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let bucket = (url.scheme, url.bucket.clone());
    if let Some(client) = clients.get(&bucket) {
        return Ok(Arc::clone(client));
    }
    let client = make(url)?;
    clients.insert(bucket, Arc::clone(&client));
    Ok(client)
}

fn make(url: &RemoteUrl) -> Result<Arc<dyn ObjectStore>, Error> {
    // Somebody in this process may have chosen already, which is as good.
    drop(rustls::crypto::ring::default_provider().install_default());
    let bucket = &url.bucket;
    let timeouts = [
        (ClientConfigKey::Timeout, REQUEST_TIMEOUT),
        (ClientConfigKey::ConnectTimeout, CONNECT_TIMEOUT),
    ];
    Ok(match url.scheme {
        Scheme::S3 => {
            let builder = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_retry(retry());
            let builder = timeouts.into_iter().fold(builder, |builder, (key, value)| {
                builder.with_config(AmazonS3ConfigKey::Client(key), value)
            });
            Arc::new(builder.build()?)
        }
        Scheme::Gcs => {
            let builder = GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_retry(retry());
            let builder = timeouts.into_iter().fold(builder, |builder, (key, value)| {
                builder.with_config(GoogleConfigKey::Client(key), value)
            });
            Arc::new(builder.build()?)
        }
        Scheme::Azure => {
            let builder = MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_retry(retry());
            let builder = timeouts.into_iter().fold(builder, |builder, (key, value)| {
                builder.with_config(AzureConfigKey::Client(key), value)
            });
            Arc::new(builder.build()?)
        }
        Scheme::Memory => Arc::new(InMemory::new()),
    })
}
