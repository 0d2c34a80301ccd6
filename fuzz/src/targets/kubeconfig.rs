//! Kubeconfigs, which a guest's administrator writes, with the files they name beside them.

use std::path::PathBuf;
use std::sync::LazyLock;

use common::kube::client::load_for_fuzzing;
use tempfile::TempDir;
use tokio::runtime::Runtime;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a folder"));
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
});

/// A certificate and its key, which no file of the checkout has to have.
static PAIR: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let made = rcgen::generate_simple_self_signed(["h".to_owned()]).expect("a certificate");
    (made.cert.pem() + &made.signing_key.serialize_pem()).into_bytes()
});
/// What stands for it in an input.
const PAIR_WORD: &[u8] = b"@pair@";

/// What is behind this line is the content of `ca.crt`, `tls.crt` and `tls.key`.
const FILES: &[u8] = b"\n---files\n";

pub fn run(data: &[u8]) {
    let split = data.windows(FILES.len()).position(|w| w == FILES);
    let (text, files) = match split {
        Some(at) => (
            data.get(..at).unwrap_or_default(),
            data.get(at + FILES.len()..).unwrap_or_default(),
        ),
        None => (data, &[][..]),
    };
    let files = match files.strip_prefix(PAIR_WORD) {
        Some(rest) => &[PAIR.as_slice(), rest].concat(),
        None => files,
    };
    // Devices and the like, which a fuzzer must not wait for.
    let named = String::from_utf8_lossy(text);
    if ["/dev", "/proc", "/sys", "..", "\\"]
        .iter()
        .any(|part| named.contains(part))
    {
        return;
    }
    let folder = FOLDER.path();
    let path = folder.join("kubeconfig");
    std::fs::write(&path, text).expect("written");
    for name in ["ca.crt", "tls.crt", "tls.key"] {
        std::fs::write(folder.join(name), files).expect("written");
    }
    RUNTIME.block_on(async {
        let followed = load_for_fuzzing(&path, |config| {
            let auth = &config.auth_info;
            auth.exec.is_none() && auth.auth_provider.is_none() && auth.token_file.is_none()
        });
        match followed.await {
            Ok(files) => {
                assert!(files.contains(&path), "the kubeconfig itself is followed");
                let relative = |file: &PathBuf| file.is_relative();
                assert!(!files.iter().any(relative), "{files:?}");
            }
            // It is logged: a word on which file, and not a page of it.
            Err(error) => assert!(
                error.to_string().contains("kubeconfig") || error.to_string().contains("TLS"),
                "{error}"
            ),
        }
    });
}
