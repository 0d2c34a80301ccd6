{{- define "gs.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "gs.selector" -}}
app.kubernetes.io/name: guest-syncer
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gs.labels" -}}
{{ include "gs.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: vf-provisioner
{{- end -}}
