//! What operators ask of the daemon: pins.

use kvbm_proto::v1;
use kvbm_proto::v1::admin_client::AdminClient;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::{Client, ClientError};

impl Client {
    /// Keeps what is resident of some blocks.
    pub async fn pin(&self, request: v1::PinRequest) -> Result<v1::PinReply, ClientError> {
        let mut admin = self.admin();
        Ok(timeout(self.deadline(), admin.pin(request))
            .await
            .map_err(|_| ClientError::Deadline)??
            .into_inner())
    }

    /// Ends a pin.
    pub async fn unpin(&self, pin_id: u64) -> Result<(), ClientError> {
        let mut admin = self.admin();
        let reply = timeout(self.deadline(), admin.unpin(v1::UnpinRequest { pin_id }));
        reply.await.map_err(|_| ClientError::Deadline)??;
        Ok(())
    }

    /// Pins of this user; of all users, for the daemon's own.
    pub async fn pins(&self) -> Result<Vec<v1::PinEntry>, ClientError> {
        let mut admin = self.admin();
        let reply = timeout(self.deadline(), admin.list_pins(v1::ListPinsRequest {}));
        Ok(reply.await.map_err(|_| ClientError::Deadline)??.into_inner().pins)
    }

    fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.session().channel())
    }
}
