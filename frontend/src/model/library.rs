//! Every model that was read, once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::files::Files;
use super::{Model, ModelError};

/// Models by folder. Folders of equal content share one model.
pub struct Library {
    instead: Option<PathBuf>,
    shelf: Mutex<Vec<Volume>>,
}

struct Volume {
    folder: PathBuf,
    fingerprint: u64,
    model: Arc<Model>,
}

impl Library {
    /// With a folder that is read instead of whatever is asked for.
    pub fn new(instead: Option<PathBuf>) -> Self {
        Self { instead, shelf: Mutex::new(Vec::new()) }
    }

    /// The model in `folder`, read on a thread that may block. It is read again for every worker that comes up,
    /// so that a changed folder is noticed; parsed it is only when its content is new.
    pub async fn get(self: &Arc<Self>, folder: &Path) -> Result<Arc<Model>, ModelError> {
        let folder = self.instead.as_deref().unwrap_or(folder).to_owned();
        let library = self.clone();
        let path = folder.clone();
        match tokio::task::spawn_blocking(move || library.load(folder)).await {
            Ok(result) => result,
            Err(error) => Err(ModelError { path, reason: error.to_string() }),
        }
    }

    fn load(&self, folder: PathBuf) -> Result<Arc<Model>, ModelError> {
        let files = Files::read(&folder)?;
        let fingerprint = files.fingerprint();
        // Held while parsing: two workers of one model come up together, and one of them does the work.
        let mut shelf = self.shelf.lock();
        if let Some(volume) = shelf.iter().find(|volume| volume.fingerprint == fingerprint) {
            return Ok(volume.model.clone());
        }
        let model = Arc::new(Model::from_files(&files)?);
        // What the folder held before is kept alive by those who still use it.
        shelf.retain(|volume| volume.folder != folder);
        shelf.push(Volume { folder, fingerprint, model: model.clone() });
        Ok(model)
    }
}
