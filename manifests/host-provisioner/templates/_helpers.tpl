{{- define "hp.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "hp.image" -}}
{{ required "image.repository is needed" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Labels of every object; call with (list . "component"). */}}
{{- define "hp.labels" -}}
{{- $root := index . 0 -}}
{{ include "hp.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: vf-provisioner
{{- end -}}

{{- define "hp.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: host-provisioner
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}
