//! Who may speak: a token that workers and clients show as gRPC metadata `authorization: Bearer TOKEN`, read from a file and
//! never logged (invariant S1).

use std::fmt;
use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

const AUTHORIZATION: &str = "authorization";
const SCHEME: &str = "Bearer";

/// Longest token.
const TOKEN_BYTES_MAX: usize = 4096;

/// A secret that a coordinator shares with its workers and clients.
#[derive(Clone)]
pub struct Token(String);

/// A token file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("read the token file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: std::io::Error,
    },
    /// It holds no token.
    #[error(
        "{path}: its first line must be a token of printable ASCII characters without spaces, at most {TOKEN_BYTES_MAX}, such \
         as `openssl rand -hex 32` makes"
    )]
    NoToken {
        /// The file.
        path: PathBuf,
    },
}

impl Token {
    /// The first line of a file.
    ///
    /// # Errors
    /// A file that cannot be read or holds no token.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let text = std::fs::read_to_string(path).map_err(|source| TokenError::Read {
            path: path.to_owned(),
            source,
        })?;
        let token = text.lines().next().unwrap_or_default().trim();
        let printable = token.chars().all(|c| c.is_ascii_graphic());
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX || !printable {
            return Err(TokenError::NoToken {
                path: path.to_owned(),
            });
        }
        Ok(Self(token.to_owned()))
    }

    fn digest(&self) -> blake3::Hash {
        blake3::hash(self.0.as_bytes())
    }
}

/// Without the secret.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Asks every caller for a service's token, if it has one.
#[derive(Clone, Debug)]
pub struct Guard(Option<blake3::Hash>);

impl Guard {
    /// Lets in who shows `token`; without one, everybody.
    pub fn new(token: Option<&Token>) -> Self {
        Self(token.map(Token::digest))
    }

    /// Whether the value of an `authorization` header opens this door.
    pub fn opens(&self, header: Option<&str>) -> bool {
        let Some(wanted) = &self.0 else { return true };
        let shown = header.and_then(|it| it.split_once(' '));
        // Digests compare in constant time.
        shown.is_some_and(|(scheme, shown)| {
            scheme.eq_ignore_ascii_case(SCHEME) && blake3::hash(shown.as_bytes()) == *wanted
        })
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let shown = request.metadata().get(AUTHORIZATION);
        if self.opens(shown.and_then(|it| it.to_str().ok())) {
            return Ok(request);
        }
        let reason = match shown {
            None => "this coordinator asks for its token: show it with --token-file FILE",
            Some(_) => {
                "the token is not this coordinator's: --token-file must name the secret of its security.token_file"
            }
        };
        Err(Status::unauthenticated(reason))
    }
}

/// Shows a token with every call.
#[derive(Clone, Debug)]
pub struct Pass(Option<MetadataValue<Ascii>>);

impl Pass {
    /// Shows `token`; without one, nothing.
    ///
    /// # Panics
    /// Never: what a [`Token`] is made of fits into a header.
    pub fn new(token: Option<&Token>) -> Self {
        let value = token.map(|token| {
            let value = format!("{SCHEME} {}", token.0);
            let mut value: MetadataValue<Ascii> =
                value.parse().expect("printable ASCII is a header");
            value.set_sensitive(true);
            value
        });
        Self(value)
    }
}

impl Interceptor for Pass {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert(AUTHORIZATION, value.clone());
        }
        Ok(request)
    }
}
