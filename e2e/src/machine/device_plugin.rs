//! A kubelet device plugin that hands one character device to as many containers as ask,
//! as KubeVirt's does with /dev/kvm: an unprivileged pod has no other way to it. Runs on
//! L1 as a service; touches a socket in the kubelet's folder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Endpoint, Server as Transport, Uri};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use super::device_plugin_api::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse, Device, DeviceSpec, Empty,
    ListAndWatchResponse, Plugin, REGISTER, RegisterRequest, Server, VERSION,
};

/// The command line of the hidden subcommand.
#[derive(Clone, Debug, clap::Args)]
pub struct DevicePluginArgs {
    /// Resource that pods ask for.
    #[arg(long, default_value = "devices.kubevirt.io/kvm")]
    pub resource: String,
    /// The device, on the node and in the container.
    #[arg(long, default_value = "/dev/kvm")]
    pub device: String,
    /// How many containers may have it.
    #[arg(long, default_value_t = 110)]
    pub count: u32,
    /// The kubelet's folder of plugin sockets.
    #[arg(long, default_value = "/var/lib/kubelet/device-plugins")]
    pub dir: PathBuf,
}

#[derive(Clone)]
struct OneDevice {
    device: String,
    count: u32,
}

impl Plugin for OneDevice {
    fn list(&self) -> ReceiverStream<Result<ListAndWatchResponse, Status>> {
        let (tx, rx) = tokio::sync::mpsc::channel(1);
        let devices = (0..self.count)
            .map(|n| Device {
                id: format!("kvm{n}"),
                health: "Healthy".into(),
            })
            .collect();
        tokio::spawn(async move {
            // A kubelet that hangs up at once asks again; nothing is lost.
            let _ = tx.send(Ok(ListAndWatchResponse { devices })).await;
            // The list never changes: the stream stays open until the kubelet ends it.
            tx.closed().await;
        });
        ReceiverStream::new(rx)
    }

    fn allocate(&self, request: AllocateRequest) -> AllocateResponse {
        let one = ContainerAllocateResponse {
            devices: vec![DeviceSpec {
                container_path: self.device.clone(),
                host_path: self.device.clone(),
                permissions: "rw".into(),
            }],
        };
        AllocateResponse {
            container_responses: vec![one; request.container_requests.len()],
        }
    }
}

/// Serves and registers; returns an error when the kubelet has restarted, which forgets
/// its plugins and removes their sockets: the service manager then starts us again.
pub async fn serve(args: DevicePluginArgs) -> Result<()> {
    if !Path::new(&args.device).exists() {
        bail!("{} is not there", args.device);
    }
    let name = format!("{}.sock", args.resource.replace(['/', '.'], "-"));
    let socket = args.dir.join(&name);
    if socket.exists() {
        std::fs::remove_file(&socket)?;
    }
    let listener =
        UnixListener::bind(&socket).with_context(|| format!("binding {}", socket.display()))?;
    let plugin = OneDevice {
        device: args.device,
        count: args.count,
    };
    let server = Transport::builder()
        .add_service(Server(plugin))
        .serve_with_incoming(UnixListenerStream::new(listener));
    let watch = async {
        register(&args.dir.join("kubelet.sock"), &name, &args.resource).await?;
        println!("registered {}", args.resource);
        while socket.exists() {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        bail!("the kubelet removed {}", socket.display())
    };
    tokio::select! {
        ended = server => ended.context("serving the plugin"),
        ended = watch => ended,
    }
}

async fn register(kubelet: &Path, endpoint: &str, resource: &str) -> Result<()> {
    let path = kubelet.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is not used: the connector knows the socket.
    let channel = Endpoint::from_static("http://kubelet")
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("connecting to {}", kubelet.display()))?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.context("the kubelet")?;
    let request = RegisterRequest {
        version: VERSION.into(),
        endpoint: endpoint.into(),
        resource_name: resource.into(),
    };
    let codec = ProstCodec::<RegisterRequest, Empty>::default();
    client
        .unary(
            Request::new(request),
            PathAndQuery::from_static(REGISTER),
            codec,
        )
        .await
        .context("registering with the kubelet")?;
    Ok(())
}
