//! The part of the kubelet's device plugin API (k8s.io/kubelet/pkg/apis/deviceplugin/
//! v1beta1/api.proto) that handing out one kind of device needs, written by hand so that
//! no protoc is needed. Field numbers are the API's.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

pub(super) const VERSION: &str = "v1beta1";
pub(super) const REGISTER: &str = "/v1beta1.Registration/Register";

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub(super) version: String,
    /// Name of the plugin's socket in the kubelet's folder.
    #[prost(string, tag = "2")]
    pub(super) endpoint: String,
    #[prost(string, tag = "3")]
    pub(super) resource_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DevicePluginOptions {
    #[prost(bool, tag = "1")]
    pub(super) pre_start_required: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Device {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) health: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListAndWatchResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) devices: Vec<Device>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ContainerAllocateRequest {
    #[prost(string, repeated, tag = "1")]
    pub(super) device_ids: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) container_requests: Vec<ContainerAllocateRequest>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DeviceSpec {
    #[prost(string, tag = "1")]
    pub(super) container_path: String,
    #[prost(string, tag = "2")]
    pub(super) host_path: String,
    #[prost(string, tag = "3")]
    pub(super) permissions: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ContainerAllocateResponse {
    #[prost(message, repeated, tag = "3")]
    pub(super) devices: Vec<DeviceSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) container_responses: Vec<ContainerAllocateResponse>,
}

/// What a plugin does; the rest of the API is optional and answered here.
pub(super) trait Plugin: Clone + Send + Sync + 'static {
    /// The devices, now and whenever they change; ends with the plugin.
    fn list(&self) -> ReceiverStream<Result<ListAndWatchResponse, Status>>;
    fn allocate(&self, request: AllocateRequest) -> AllocateResponse;
}

/// The gRPC service of a plugin.
#[derive(Clone)]
pub(super) struct Server<P>(pub(super) P);

impl<P> tonic::server::NamedService for Server<P> {
    const NAME: &'static str = "v1beta1.DevicePlugin";
}

impl<P: Plugin> Service<http::Request<Body>> for Server<P> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let plugin = self.0.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/v1beta1.DevicePlugin/GetDevicePluginOptions" => {
                    Grpc::new(ProstCodec::default())
                        .unary(Options, request)
                        .await
                }
                "/v1beta1.DevicePlugin/ListAndWatch" => {
                    Grpc::new(ProstCodec::default())
                        .server_streaming(List(plugin), request)
                        .await
                }
                "/v1beta1.DevicePlugin/Allocate" => {
                    Grpc::new(ProstCodec::default())
                        .unary(Allocate(plugin), request)
                        .await
                }
                other => Status::unimplemented(other.to_owned()).into_http(),
            })
        })
    }
}

struct Options;
impl UnaryService<Empty> for Options {
    type Response = DevicePluginOptions;
    type Future = BoxFuture<Response<Self::Response>, Status>;
    fn call(&mut self, _: Request<Empty>) -> Self::Future {
        Box::pin(async { Ok(Response::new(DevicePluginOptions::default())) })
    }
}

struct List<P>(P);
impl<P: Plugin> ServerStreamingService<Empty> for List<P> {
    type Response = ListAndWatchResponse;
    type ResponseStream = ReceiverStream<Result<ListAndWatchResponse, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;
    fn call(&mut self, _: Request<Empty>) -> Self::Future {
        let stream = self.0.list();
        Box::pin(async { Ok(Response::new(stream)) })
    }
}

struct Allocate<P>(P);
impl<P: Plugin> UnaryService<AllocateRequest> for Allocate<P> {
    type Response = AllocateResponse;
    type Future = BoxFuture<Response<Self::Response>, Status>;
    fn call(&mut self, request: Request<AllocateRequest>) -> Self::Future {
        let response = self.0.allocate(request.into_inner());
        Box::pin(async { Ok(Response::new(response)) })
    }
}
