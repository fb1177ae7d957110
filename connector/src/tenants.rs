//! Which tenant a namespace belongs to, as far as somebody said: a label that goes to the daemon with the namespace.

use std::collections::HashMap;
use std::sync::Arc;

use kvbm_hash::Namespace;
use parking_lot::Mutex;

/// As many namespaces as a session may have.
const NAMESPACES_MAX: usize = 65_536;

/// See the module. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Tenants(Arc<Mutex<HashMap<Namespace, Arc<str>>>>);

impl Tenants {
    /// From its next registration on, `namespace` is this tenant's. To be said before it is used.
    pub fn name(&self, namespace: Namespace, tenant: &str) {
        let mut tenants = self.0.lock();
        if tenants.len() < NAMESPACES_MAX && !tenants.contains_key(&namespace) {
            tenants.insert(namespace, tenant.into());
        }
    }

    /// Whose it is.
    pub(crate) fn of(&self, namespace: &Namespace) -> Option<Arc<str>> {
        self.0.lock().get(namespace).cloned()
    }
}
